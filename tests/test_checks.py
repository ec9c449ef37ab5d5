import re

import numpy as np
import pytest

from fastai_swa import checks


@pytest.mark.parametrize(
    'check, value, error, sentence',
    [
        (checks.check_count, 0, ValueError, 'n must be at least 1, not 0'),
        (checks.check_count, 1.5, TypeError, 'n must be an int, not 1.5'),
        (checks.check_count, True, TypeError, 'n must be an int, not True'),
        (checks.check_count, None, TypeError, 'n must be an int, not None'),
        (checks.check_number, '1', TypeError, "n must be a number, not '1'"),
        (checks.check_number, True, TypeError, 'n must be a number, not True'),
        (checks.check_positive, 0, ValueError, 'n must be positive, not 0'),
        (checks.check_positive, float('nan'), ValueError, 'n must be positive, not nan'),
        (checks.check_positive, float('inf'), ValueError, 'n must be positive, not inf'),
        (checks.check_not_negative, -1, ValueError, 'n must not be negative, not -1'),
        (checks.check_not_negative, float('nan'), ValueError, 'n must not be negative, not nan'),
        (checks.check_share, 50, ValueError, 'n must be a share from 0 to 1, not 50'),
        (checks.check_share, float('nan'), ValueError, 'n must be a share from 0 to 1, not nan'),
        (checks.check_numbers, 'far', TypeError, "n must be numbers, not 'far'"),
        (checks.check_numbers, [1, float('inf')], ValueError, 'n must be finite, not [1, inf]'),
    ],
)
def test_what_cannot_be_used_is_named_with_what_it_must_be(check, value, error, sentence):
    with pytest.raises(error, match=f'^{re.escape(sentence)}$'):
        check('n', value)


def test_choices_are_said_in_full():
    with pytest.raises(ValueError, match="^how must be 'mean', 'vote' or 'stack', not 'median'$"):
        checks.check_choice('how', 'median', ('mean', 'vote', 'stack'))
    with pytest.raises(ValueError, match="^column must be one of loss, accuracy, not 'f1'$"):
        checks.check_known('column', 'f1', {'loss': 0, 'accuracy': 1})


def test_what_can_be_used_comes_back_as_plain_python():
    assert checks.check_count('n', np.int64(3)) == 3 and type(checks.check_count('n', np.int64(3))) is int
    assert checks.check_count('n', None, optional=True) is None and checks.check_count('n', 0, least=0) == 0
    assert checks.check_positive('n', np.float32(0.5)) == 0.5
    assert type(checks.check_positive('n', np.float32(0.5))) is float
    assert [checks.check_share('n', x) for x in (0, 1)] == [0, 1] and checks.check_not_negative('n', 0) == 0
    assert checks.check_numbers('n', 2).tolist() == [2.0] and checks.check_numbers('n', [[1], [2]]).shape == (2,)
    assert checks.check_choice('how', 'vote', ('mean', 'vote')) == 'vote'
    assert checks.check_known('column', 'loss', ['loss']) == 'loss'
