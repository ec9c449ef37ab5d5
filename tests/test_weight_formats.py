import collections
import io
import json
import pickle
import struct
import zipfile
from fractions import Fraction

import pytest
import torch

from fastai_swa.weight_formats import check_any, is_safetensors, read_any, read_safetensors, read_zip
from fastai_swa.weights import read_weights

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def tensors(seed=0):
    "Of many kinds: views of one storage, of other strides, of one number, empty, in all precisions."
    g = torch.Generator().manual_seed(seed)
    big = torch.randn(5, 7, generator=g)
    found = {'rows': big[1:3], 'turned': big.T, 'one': torch.tensor(2.5), 'none': torch.empty(0, 3)}
    found |= {f'of {dtype}': (torch.randn(2, 3, generator=g) * 9).to(dtype) for dtype in DTYPES}
    found['parameter'] = torch.nn.Parameter(torch.randn(4, generator=g))
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        same = found[name].dtype == t.dtype and found[name].shape == t.shape
        assert same and torch.equal(found[name], t), name


ran = []


def run():
    ran.append(True)


class Runs:
    "What runs code when a file is unpickled."

    def __reduce__(self):
        return run, ()


class Strange(collections.defaultdict):
    "An object of a class of a user's, with content of its own."


def strange():
    o = Strange(list, {'a': 1})
    o.note = Fraction(1, 3)
    return o


# torch.save


@pytest.mark.parametrize('seed', range(5))
def test_tensors_are_read_beside_objects_of_any_kind_and_as_torch_reads_them(tmp_path, seed):
    beside = [strange(), {Fraction(1, 2)}, Fraction, len, io.BytesIO(b'x'), bytearray(b'y'), slice(1)]
    torch.save({'model': tensors(seed), 'opt': beside, 'epoch': 3}, tmp_path / 'a.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'a.pth', weights_only=True)
    found = read_any(tmp_path / 'a.pth')
    assert found['epoch'] == 3
    assert_equal(found['model'], tensors(seed))
    torch.save(tensors(seed), tmp_path / 'b.pth')
    assert_equal(read_zip(tmp_path / 'b.pth'), torch.load(tmp_path / 'b.pth', weights_only=True))


def test_what_torch_keeps_beside_a_state_dict_is_read_too(tmp_path):
    module = torch.nn.Linear(2, 2)
    torch.save({'model': module.state_dict(), 'opt': Runs()}, tmp_path / 'a.pth')
    assert read_zip(tmp_path / 'a.pth')['model']._metadata == module.state_dict()._metadata


def test_no_code_in_a_file_is_run(tmp_path):
    file = tmp_path / 'a.pth'
    torch.save({'model': tensors(), 'opt': [Runs(), {'a': Runs()}]}, file)
    torch.load(file, weights_only=False)
    assert ran  # it would
    ran.clear()
    assert_equal(read_weights(file), tensors())
    assert not ran
    torch.save({'model': {**tensors(), 'own': Runs()}}, file)
    with pytest.raises(ValueError, match='a.pth holds no state dict'):
        read_weights(file)
    assert not ran


def with_pickle(file, data: bytes):
    "A file of torch's with `data` in the place of its pickle."
    torch.save({'a': torch.ones(2)}, file)
    with zipfile.ZipFile(file) as z:
        records = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(file, 'w') as z:
        for name, content in records.items():
            z.writestr(name, data if name.endswith('data.pkl') else content)
    return file


@pytest.mark.parametrize(
    'data',
    [
        b'cbuiltins\neval\n(S"ran.append(1)"\ntR.',
        b"(S'ran.append(1)'\nibuiltins\neval\n.",
        b'c__builtin__\nexec\n(S"ran.append(1)"\ntR.',
        b'cos\nsystem\n(S"exit 1"\ntR.',
        # what is named there cannot be changed: a state for the class, with and without slots
        b'ctorch._utils\n_rebuild_tensor_v2\n}S"__defaults__"\nI1\nsb.',
        b'ctorch._utils\n_rebuild_tensor_v2\n(N}S"__doc__"\nI1\nstb.',
        b'ccollections\nOrderedDict\n(N}S"__doc__"\nI1\nstb.',
        b'cno_such\nclass\n(N}S"__doc__"\nI1\nstb.',
        b'ctorch.storage\n_load_from_bytes\n(S"x"\ntR.',
        b'((tR.',
        b'',
        b'.',
        b'\x80\x02}.' * 2,
    ],
)
def test_a_crafted_file_is_one_sentence_and_changes_nothing(tmp_path, data):
    from fastai_swa import weight_formats

    docs = [vars(weight_formats)[name].__doc__ for name in ('Left', '_Tensor')]
    file = with_pickle(tmp_path / 'a.pth', data)
    try:
        assert read_weights(file) == {}
    except ValueError as e:
        assert 'a.pth holds no state dict' in str(e)
    assert not ran and docs == [vars(weight_formats)[name].__doc__ for name in ('Left', '_Tensor')]


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    class Beyond:
        def __init__(self, size, stride, offset):
            self.args = size, stride, offset

        def __reduce__(self):
            size, stride, offset = self.args
            rebuild, (storage, *_, hooks) = torch.ones(4).__reduce_ex__(2)
            return rebuild, (storage, offset, size, stride, False, hooks)

    for args in ((9,), (1,), 0), ((2,), (100,), 0), ((1,), (1,), 10**6), ((2,), (-1,), 0), ((1,), (1,), -1):
        torch.save({'model': {'a': Beyond(*args)}, 'opt': Runs()}, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match='a.pth holds no state dict'):
            read_weights(tmp_path / 'a.pth')


def test_a_file_that_inflates_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('a/data.pkl', b'0' * 10**7)
    with pytest.raises(ValueError, match='a.pth is damaged, or it holds no weights'):
        read_weights(tmp_path / 'a.pth')


# safetensors

CODES = dict(zip(DTYPES, 'F32 F64 F16 BF16 I64 I32 I16 I8 U8 BOOL C64'.split()))


def parts(found):
    "Header and data of a file of safetensors, by hand."
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, t in found.items():
        raw = t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b''
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {'dtype': CODES[t.dtype], 'shape': list(t.shape), 'data_offsets': offsets}
        data += raw
    return header, data


def write(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack('<Q', len(text)) + text + data)
    return file


@pytest.mark.parametrize('name', ['a.safetensors', 'a.bin'])
def test_safetensors_are_read_whatever_the_file_is_called(tmp_path, name):
    found = tensors()
    file = write(tmp_path / name, *parts(found))
    assert is_safetensors(file)
    check_any(file)
    assert_equal(read_weights(file), found)


def test_what_the_safetensors_package_writes_is_read_as_it_reads_it(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    found = {name: t.detach().contiguous().clone() for name, t in tensors().items()}
    safetensors.save_file(found, tmp_path / 'a.safetensors', metadata={'format': 'pt'})
    assert_equal(read_safetensors(tmp_path / 'a.safetensors'), safetensors.load_file(tmp_path / 'a.safetensors'))


def changed(**said):
    "A file with one tensor, of which its header says something else."
    return {'a': {'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [0, 16]} | said}, bytes(16)


ONE = {'dtype': 'U8', 'shape': [1], 'data_offsets': [0, 1]}


@pytest.mark.parametrize(
    'header, data',
    [
        changed(shape=[2, 3]),
        changed(shape=[4, -1]),
        changed(shape=[2, 2.0]),
        changed(shape=[True, 4]),
        changed(shape=[10**30, 10**30]),
        changed(shape='22'),
        changed(shape=None),
        changed(dtype='F33'),
        changed(dtype=['F32']),
        changed(data_offsets=[0, 20]),
        changed(data_offsets=[-16, 0]),
        changed(data_offsets=[4, 20]),
        changed(data_offsets=[16, 0]),
        changed(data_offsets=[0]),
        changed(data_offsets=[0, 1e400]),
        ({'a': ONE, 'b': ONE}, b'1'),  # one over the other
        ({'a': ONE, 'b': ONE | {'data_offsets': [2, 3]}}, b'123'),  # a hole
        ({'a': ONE}, b''),
        ({'a': ONE}, b'12'),
        ({'a': 3}, b''),
        ([], b''),
        (b'{' * 100_000, b''),
        (b'{"a": ' * 100_000, b''),
        (b'{', b''),
        (b'', b''),
        (b'\xff', b''),
    ],
)
def test_safetensors_whose_header_is_not_true_are_one_sentence(tmp_path, header, data):
    file = write(tmp_path / 'a.safetensors', header, data)
    with pytest.raises(ValueError, match='a.safetensors is damaged, or it holds no weights'):
        read_weights(file)


def test_safetensors_that_are_cut_anywhere_are_one_sentence(tmp_path):
    whole = write(tmp_path / 'a.safetensors', *parts({'a': torch.ones(3), 'b': torch.ones(2, 2)})).read_bytes()
    for n in range(len(whole)):
        (tmp_path / 'a.safetensors').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='a.safetensors is damaged'):
            read_weights(tmp_path / 'a.safetensors')
    (tmp_path / 'a.safetensors').write_bytes(struct.pack('<Q', 2**63) + whole[8:])
    with pytest.raises(ValueError, match='a.safetensors is damaged'):
        read_weights(tmp_path / 'a.safetensors')
