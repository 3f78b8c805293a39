"""Where the frameworks' own clipping is silently wrong, measured: every row is right on every backend, bit for bit.

The exact values are worked out by hand; NumPy's result stands for all backends, and each is compared with it.
"""

import functools
import math
import sys

import ml_dtypes
import numpy as np
import pytest

import clipcore as cc
from clipcore.testing import checks
from clipcore.testing.tensors import as_array, as_arrays, as_tensors

F16, BF16, F32, F64, C64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64


def full(value, dtype, size=1):
    return np.full(size, value, dtype)


# name: (gradients, limit, exact clipped values of the first tensor's first elements, exact norm)
GLOBAL_NORM = {
    "squares that overflow float32": ([full(1e20, F32, 3)], 1.0, [3**-0.5] * 3, 3**0.5 * float(F32(1e20))),
    "squares that underflow float32": ([np.array([3e-30, 4e-30], F32)], 1e-30, [6e-31, 8e-31], 5e-30),
    "squares among the subnormal": ([np.array([3e-22, 4e-22], F32)], 1e-22, [6e-23, 8e-23], 5e-22),
    "a limit no larger than torch's epsilon": ([np.array([3e-6, 4e-6], F32)], 1e-6, [6e-7, 8e-7], 5e-6),
    "a norm that equals the limit": ([np.array([3.0, 4.0], F32)], 5.0, [3.0, 4.0], 5.0),
    "in range": ([np.arange(1.0, 17.0, dtype=F32)], 41.0, list(range(1, 17)), 1496**0.5),
    "float16, one element": ([full(300, F16)], 1.0, [1.0], 300.0),
    "float16, 1,000 elements": ([full(300, F16, 1000)], 1.0, [1000**-0.5] * 3, 300 * 1000**0.5),
    "float16, 100,000 elements": ([full(300, F16, 100_000)], 1.0, [100_000**-0.5] * 3, 300 * 100_000**0.5),
    "float16, near its largest": ([full(6e4, F16)], 1e-3, [1e-3], 6e4),
    "float16, small": ([full(1e-4, F16, 100)], 1e-4, [1e-5] * 3, 10 * float(F16(1e-4))),
    "bfloat16": ([full(300, BF16, 1000)], 1.0, [1000**-0.5] * 3, 300 * 1000**0.5),
    "1,000 tensors of bfloat16": ([full(1, BF16)] * 1000, 1.0, [1000**-0.5], 1000**0.5),
    "3,000 tensors of float16": ([full(1, F16)] * 3000, 1.0, [3000**-0.5], 3000**0.5),
    "zeros, limit 0": ([full(0, F32, 4)], 0.0, [0.0] * 4, 0.0),
    "limit inf": ([np.array([3.0, 4.0], F32)], math.inf, [3.0, 4.0], 5.0),
    "complex": ([np.array([3 + 4j, 0], C64)], 1.0, [0.6 + 0.8j, 0], 5.0),
    "float32 and float16 together": ([full(3, F32), full(4, F16)], 1.0, [0.6], 5.0),
    "float16 that overflows beside float32": (
        [full(4e4, F16, 4), full(1, F32)],
        1.0,
        [0.5] * 4,
        (4 * 4e4**2 + 1) ** 0.5,
    ),
    "an empty tensor": ([np.zeros(0, F32), np.array([3.0, 4.0], F32)], 1.0, [], 5.0),
    "10 million of 0.1": ([full(0.1, F32, 10**7)], 1.0, [1e7**-0.5] * 3, float(F32(0.1)) * 1e7**0.5),
    "40 million of 0.1": ([full(0.1, F32, 4 * 10**7)], 1.0, [4e7**-0.5] * 3, float(F32(0.1)) * 4e7**0.5),
}
UNIT = {F16: 2**-11, BF16: 2**-8, F32: 2**-24, F64: 2**-53, C64: 2**-24}
SMALLEST = {F16: 2**-25, BF16: 2**-134, F32: 2**-150, C64: 2**-150}


@pytest.mark.parametrize("row", GLOBAL_NORM)
def test_the_global_norm_is_exact_and_all_bits_are_those_of_numpy(backend, row):
    arrays, limit, exact, norm = GLOBAL_NORM[row]
    policy = cc.ClipByGlobalNorm(limit)
    grads = as_tensors(backend, arrays)
    clipped, report = cc.clip(grads, policy)

    first = as_array(backend, clipped[0])
    kind = first.dtype.type
    np.testing.assert_allclose(first[: len(exact)].astype(complex), exact, rtol=4 * UNIT[kind], atol=SMALLEST[kind])
    assert report.norm == pytest.approx(norm, rel=1e-14)
    assert report.clipped == (norm > limit)
    expected, _ = cc.clip(arrays, policy)
    for ours, theirs in zip(clipped, expected, strict=True):
        array = as_array(backend, ours)
        assert array.dtype == theirs.dtype
        assert array.tobytes() == theirs.tobytes()
    if norm <= limit:
        assert all(after is before for after, before in zip(clipped, grads, strict=True))


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [("propagate", [math.nan] * 2, [math.nan]), ("zero", [0, 1 / 5**0.5], [2 / 5**0.5]), ("skip", [0, 0], [0])],
)
def test_what_an_infinity_does_is_what_the_policy_says(backend, mode, first, second):
    grads = as_tensors(backend, [np.array([math.inf, 1], F32), np.array([2], F32)])
    clipped, report = cc.clip(grads, cc.ClipByGlobalNorm(1.0, nonfinite=mode))
    np.testing.assert_allclose(as_array(backend, clipped[0]), first, rtol=1e-7)
    np.testing.assert_allclose(as_array(backend, clipped[1]), second, rtol=1e-7)
    assert report.nonfinite == 1


def test_an_infinity_raises_with_its_place_where_the_policy_says_so(backend):
    grads = as_tensors(backend, [np.array([1], F32), np.array([math.inf, 1], F32)])
    with pytest.raises(cc.NonFinite, match=r"1 elements.*grads\[1\]"):
        cc.clip(grads, cc.ClipByGlobalNorm(1.0, nonfinite="raise"))


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_limit_that_would_flip_signs_or_mean_nothing_is_refused(limit):
    for policy in (cc.ClipByNorm, cc.ClipByGlobalNorm):
        with pytest.raises(cc.InvalidPolicy, match="max_norm"):
            policy(limit)


@pytest.mark.parametrize("p", [0, -1, -math.inf, 0.5, math.nan])
def test_a_p_that_is_no_norm_is_refused(p):
    with pytest.raises(cc.InvalidPolicy, match="p is"):
        cc.ClipByGlobalNorm(1.0, p=p)


def test_p_three_does_not_overflow(backend):
    grads = as_tensors(backend, [full(1e13, F32, 2)])
    clipped, report = cc.clip(grads, cc.ClipByGlobalNorm(1.0, p=3))
    np.testing.assert_allclose(as_array(backend, clipped[0]), [2 ** (-1 / 3)] * 2, rtol=1e-7)
    assert report.norm == pytest.approx(float(F32(1e13)) * 2 ** (1 / 3), rel=1e-14)


def test_the_largest_norm_ignores_an_empty_tensor(backend):
    grads = as_tensors(backend, [np.zeros((0, 3), F32), np.array([3, -4], F32)])
    clipped, report = cc.clip(grads, cc.ClipByGlobalNorm(2.0, p=math.inf))
    assert report.norm == 4
    np.testing.assert_array_equal(as_array(backend, clipped[1]), [1.5, -2])


BY_NORM = {
    "in range, squares overflow": ([np.array([2e18, 2e18], F32)], 1e21),
    "in range, float16 squares overflow": ([np.array([200, 200], F16)], 400.0),
    **{f"in range, limit {limit}": ([np.arange(1, 4, dtype=F32) / 4], float(limit)) for limit in range(1, 100)},
}


@pytest.mark.parametrize("row", BY_NORM)
def test_what_is_in_range_comes_back_as_the_same_tensor(backend, row):
    arrays, limit = BY_NORM[row]
    grads = as_tensors(backend, arrays)
    for policy in (cc.ClipByNorm(limit), cc.ClipByGlobalNorm(limit)):
        clipped, report = cc.clip(grads, policy)
        assert clipped[0] is grads[0]
        assert not report.clipped


@functools.cache  # once for all backends
def many_normal_numbers(count):
    """So many numbers, and their norm from an exact sum of squares."""
    array = np.random.default_rng(0).standard_normal(count, dtype=F32)
    squares = (square for part in np.split(array, 100) for square in (part.astype(F64) ** 2).tolist())
    return array, math.sqrt(math.fsum(squares))


@pytest.mark.parametrize("count", [10**7, 4 * 10**7])
def test_the_norm_of_many_normal_numbers_is_exact_to_one_unit(backend, count):
    array, exact = many_normal_numbers(count)
    _, report = cc.clip(as_tensors(backend, [array]), cc.ClipByGlobalNorm(1.0))
    assert report.norm == pytest.approx(exact, rel=1e-14)


@functools.cache
def a_hundred_million_numbers():
    """Whole numbers of float32, as many bits as it has, and their norm: squares are summed in integers."""
    array, squares, rng = np.empty(10**8, F32), 0, np.random.default_rng(0)
    for part in np.split(array, 10**4):  # of 2**14 numbers at most, so that their squares stay within 62 bits
        whole = rng.integers(-(2**24), 2**24, part.size)
        part[...] = whole
        squares += int(np.dot(whole, whole))
    return array, math.sqrt(squares)


def test_the_norm_of_a_hundred_million_numbers_is_exact_to_one_unit(backend):
    array, exact = a_hundred_million_numbers()
    assert cc.clip(as_tensors(backend, [array]), cc.ClipByGlobalNorm(1e30))[1].norm == pytest.approx(exact, rel=1e-15)


def test_a_clipped_norm_is_over_the_limit_by_a_rounding_at_most(backend):
    rng = np.random.default_rng(0)
    for _ in range(50):
        arrays = [rng.standard_normal(100).astype(F32) for _ in range(3)]
        clipped, _ = cc.clip(as_tensors(backend, arrays), cc.ClipByGlobalNorm(1.0))
        squares = [float(x) ** 2 for tensor in clipped for x in as_array(backend, tensor)]
        assert math.sqrt(math.fsum(squares)) <= 1 + 2**-23


@pytest.mark.parametrize(
    ("values", "norm", "summed"), [([3.0, 4.0], 7.0, [0, 1, 0, 0]), ([3.0, -3.0], 0.0, [0, 0, 0, 0])]
)
def test_a_row_that_a_sparse_gradient_holds_twice_counts_as_its_sum(backend, values, norm, summed):
    if backend.name == "torch":
        torch = sys.modules["torch"]
        sparse = torch.sparse_coo_tensor([[1, 1]], values, (4,), check_invariants=True)
    elif backend.name == "tensorflow":
        tf = sys.modules["tensorflow"]
        sparse = tf.IndexedSlices(tf.constant(values), tf.constant([1, 1]), tf.constant([4]))
    else:
        assert backend.name == "numpy"  # which has no sparse tensors
        return
    clipped, report = cc.clip([sparse], cc.ClipByGlobalNorm(1.0))
    assert report.norm == norm
    if norm:
        np.testing.assert_array_equal(as_array(backend, clipped[0]), summed)


def compiled(backend, function):
    """The function as its framework compiles it, in each way that there is, taking and giving tensors."""
    if backend.name == "torch":
        torch = sys.modules["torch"]
        torch.compiler.reset()  # it compiles one function for a few kinds of arguments alone
        return [torch.compile(function, backend="aot_eager", fullgraph=True)]
    if backend.name == "tensorflow":
        tf = sys.modules["tensorflow"]
        return [tf.function(function), tf.function(function, jit_compile=True)]
    assert backend.name == "numpy"  # which has no compiler
    return []


# thousands of tensors take a compiler longer than all other rows together, and show it nothing new
COMPILED = [row for row in GLOBAL_NORM if len(GLOBAL_NORM[row][0]) < 10]


@pytest.mark.parametrize("row", COMPILED)
def test_inside_a_compiled_function_every_row_is_right_within_one_unit(backend, row):
    arrays, limit, _, _ = GLOBAL_NORM[row]
    policy = cc.ClipByGlobalNorm(limit)
    for function in compiled(backend, lambda grads: cc.clip(grads, policy)):
        check_compiled(backend, row, *function(as_tensors(backend, arrays)))


def check_compiled(backend, row, clipped, report):
    arrays, limit, _, norm = GLOBAL_NORM[row]
    # what is smaller than the smallest normal number may be flushed to zero: TensorFlow's kernels do
    flushed = checks.coarsest(checks.smallest_normal, arrays)
    wanted, _ = cc.clip(arrays, cc.ClipByGlobalNorm(limit))
    checks.assert_close(as_arrays(backend, clipped), wanted, ulps=1, absolute=flushed)
    assert float(report.norm) == pytest.approx(norm, rel=1e-14)
    assert bool(report.clipped) == (norm > limit)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
def test_inductor_gets_every_row_right_within_one_unit(backend):
    if backend.name != "torch":
        assert backend.name in ("numpy", "tensorflow")  # whose compilers the test above has
        return
    rows = [row for row in COMPILED if sum(array.size for array in GLOBAL_NORM[row][0]) < 10**6]
    policies = [cc.ClipByGlobalNorm(GLOBAL_NORM[row][1]) for row in rows]
    together = sys.modules["torch"].compile(
        lambda lists: [cc.clip(grads, policy) for grads, policy in zip(lists, policies, strict=True)], fullgraph=True
    )
    for row, (clipped, report) in zip(
        rows, together([as_tensors(backend, GLOBAL_NORM[r][0]) for r in rows]), strict=True
    ):
        check_compiled(backend, row, clipped, report)


def test_values_are_clipped_to_their_bounds_and_complex_ones_are_refused(backend):
    grads = as_tensors(backend, [np.array([-math.inf, -3, 0.25, 5], F32)])
    clipped, report = cc.clip(grads, cc.ClipByValue(-1.0, 2.0))
    np.testing.assert_array_equal(as_array(backend, clipped[0]), [-1, -1, 0.25, 2])
    assert report.clipped
    assert report.nonfinite == 0
    with pytest.raises(cc.InvalidInput, match="complex64"):
        cc.clip(as_tensors(backend, [np.zeros(2, C64)]), cc.ClipByValue(1.0))
