"""The arguments of `SWACallback` as functions of their own; what the callback says of them: `test_callback.py`."""

import numpy as np
import pytest

from fastai_swa import ema, equal
from fastai_swa.arguments import (
    check_average,
    check_cycle_len,
    check_name,
    check_swa_start,
    plain_cycle_len,
    plain_weight,
)


def test_what_is_good_comes_back_as_plain_python():
    assert [check_swa_start(x) for x in (0, np.int64(3), 0.25, np.float32(0.5))] == [0, 3, 0.25, 0.5]
    assert [type(check_swa_start(x)) for x in (np.int64(3), np.float32(0.5))] == [int, float]
    assert check_cycle_len(np.int64(2)) == 2 and check_cycle_len(range(1, 7, 2)) == [1, 3, 5]
    assert check_cycle_len(check_name) is check_name and check_name('ema_2') == 'ema_2' and check_average(None) is None


@pytest.mark.parametrize(
    'check, value, error',
    [
        (check_swa_start, True, TypeError),
        (check_swa_start, '3', TypeError),
        (check_swa_start, -1, ValueError),
        (check_swa_start, 1.0, ValueError),
        (check_swa_start, float('nan'), ValueError),
        (check_cycle_len, 0, ValueError),
        (check_cycle_len, False, TypeError),
        (check_cycle_len, 'ab', TypeError),
        (check_cycle_len, [], ValueError),
        (check_cycle_len, [1, 1], ValueError),
        (check_cycle_len, [2.0], TypeError),
        (check_name, 'from', ValueError),
        (check_average, 3, TypeError),
        (check_average, 'there/is/none.pth', FileNotFoundError),
    ],
)
def test_what_is_not_is_one_sentence_that_names_the_argument(check, value, error):
    argument = check.__name__.removeprefix('check_')
    with pytest.raises(error, match=f'^{argument}') as e:
        check(value)
    assert '\n' not in str(e.value)


def test_functions_are_told_apart_by_their_values():
    ends = [0, 2, 6]
    assert plain_cycle_len(lambda epoch: epoch in ends) == ends == plain_cycle_len(ends) and plain_cycle_len(4) == 4
    assert plain_cycle_len(lambda epoch: [True, False, True][epoch]) == [0, 2]
    assert plain_weight(equal) == plain_weight(lambda n: 1 / (n + 1)) != plain_weight(ema(0.9))
    assert plain_weight(equal)[:3] == [1, 1 / 2, 1 / 3]
    assert plain_weight(lambda n: [None, 0.5, 'x'][n])[:4] == [1, 0.5, None, None]
