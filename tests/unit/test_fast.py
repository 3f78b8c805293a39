"""The multi-array kernels: every bit as NumPy has it, for any list, from any thread, with or without a cache."""

import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcore.clipping import fast, kernels
from clipcore.clipping.fast import compiler, sums, threads

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
NARROW = ["float16", "bfloat16", "float32"]
BORDERS = [0, 1, 2, 15, 16, 17, 127, 128, 129, 300, 511, 513, 16383, 16384, 16385, 50001]
# (outer, units, inner): rows, columns, both; narrow, wide, across the borders of tiles and of pieces; empty
SHAPES = [
    *[(1, 70, 300), (1, 3, 40000), (1, 40, 9), (1, 5000, 1), (1, 1, 20000), (1, 2, 255), (1, 2, 256)],
    *[(300, 70, 1), (3000, 2, 1), (129, 3000, 1), (40000, 3, 1), (20000, 1, 1), (257, 65, 1)],
    *[(5, 60, 3), (700, 33, 9), (7, 5, 300), (3, 2, 20000), (50000, 1, 3), (0, 3, 4), (4, 0, 3), (4, 3, 0)],
]


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(params=NARROW)
def narrow(request):
    return request.param


def bits(array):
    return array.reshape(-1).view(f"u{array.itemsize}")


def from_bits(patterns, name):
    size = DTYPES[name].itemsize
    return np.asarray(patterns, f"u{size}").view(DTYPES[name])


def random_arrays(name, sizes, seed=0, spread=3):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=n) * 2.0 ** rng.integers(-spread, spread + 1, n)).astype(DTYPES[name]) for n in sizes]


def addresses(arrays):
    return np.array([a.ctypes.data for a in arrays], np.int64)


def sizes(arrays):
    return np.array([a.size for a in arrays], np.int64)


def whole(arrays):
    """(outer, units, inner) of arrays that are one unit each."""
    ones = np.ones(len(arrays), np.int64)
    return ones, ones, sizes(arrays)


def shapes(arrays):
    """(outer, units, inner) of arrays of these three axes."""
    return np.array([a.shape for a in arrays], np.int64).T.copy()


@np.errstate(invalid="ignore")  # signalling NaN
def assert_same(actual, expected):
    """Equal bits, NaN payloads aside."""
    equal = (bits(actual) == bits(expected)) | (np.isnan(actual) & np.isnan(expected)).reshape(-1)
    assert equal.all(), f"{np.count_nonzero(~equal)} of {equal.size} differ"


def assert_close(actual, expected, error):
    """Sums within a relative error, non-finite where they should be."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    finite = np.isfinite(expected)
    assert (np.isfinite(actual) == finite).all()
    assert (np.abs(actual[finite] - expected[finite]) <= error * expected[finite]).all()


@np.errstate(invalid="ignore")  # signalling NaN
def exact_sum(array):
    wide = array.astype(np.float64).reshape(-1)
    return math.fsum(wide * wide) if np.isfinite(wide).all() else math.nan


def multiplied(array, factor):
    """What `scale` is to give, by NumPy: factors broadcast."""
    wide = np.float64 if array.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        return (array.astype(wide) * np.asarray(factor).astype(wide)).astype(array.dtype)


def summed(arrays, name):
    return fast.unit_sums_of_squares(addresses(arrays), *whole(arrays), name)


def scaled(arrays, name, factors, targets=None):
    """The arrays scaled in place, or into targets."""
    targets = arrays if targets is None else targets
    fast.scale_units(addresses(arrays), addresses(targets), *whole(arrays), name, np.array(factors, np.float64))
    return targets


@st.composite
def pattern_lists(draw, names=tuple(DTYPES)):
    """A dtype and arrays of any of its bit patterns: NaN, infinities and subnormal numbers too."""
    name = draw(st.sampled_from(names))
    seeds = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2**32 - 1), st.booleans()), max_size=4))
    arrays = []
    for size, seed, finite in seeds:
        raw = np.random.default_rng(seed).integers(0, 256, size * DTYPES[name].itemsize, np.uint8)
        array = raw.view(DTYPES[name])
        with np.errstate(invalid="ignore"):  # signalling NaN
            arrays.append(np.where(np.isfinite(array), array, np.ones_like(array)) if finite else array)
    return name, arrays


def test_the_kernels_are_available_here():
    assert fast.available()


@given(pattern_lists(NARROW))
def test_narrow_sums_are_exact_within_their_bound_and_non_finite_just_where_an_element_is(drawn):
    name, arrays = drawn
    assert_close(summed(arrays, name), [exact_sum(a) for a in arrays], 2.0**-47)


@given(pattern_lists(), st.floats(0, 4, width=32), st.booleans())
def test_scaling_has_the_bits_of_numpy_in_place_and_out_of_place(drawn, factor, in_place):
    name, arrays = drawn
    expected = [multiplied(a, factor) for a in arrays]
    results = scaled(arrays, name, [factor] * len(arrays), arrays if in_place else [np.empty_like(a) for a in arrays])
    for result, reference in zip(results, expected, strict=True):
        assert_same(result, reference)


def test_lengths_on_both_sides_of_every_border_are_summed_within_the_bound(dtype):
    arrays = random_arrays(dtype, BORDERS)
    assert_close(summed(arrays, dtype), [exact_sum(a) for a in arrays], 2.0**-47)


def test_lengths_on_both_sides_of_every_border_are_scaled_and_nothing_beyond_them(dtype):
    arrays = random_arrays(dtype, BORDERS)
    factors = np.random.default_rng(1).uniform(0.1, 2, len(arrays)).astype(np.float32)
    padded = [np.full(a.size + 2, 7, a.dtype) for a in arrays]
    scaled(arrays, dtype, factors, [p[1:-1] for p in padded])
    for source, target, factor in zip(arrays, padded, factors, strict=True):
        assert_same(target[1:-1], multiplied(source, factor))
        assert target[0] == target[-1] == 7


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("factor", [0.0, 2.0**-30, 0.1, 0.33333334, 0.5, 0.99999994, 1.0, 1.0000001, 3.0, 1e30])
def test_every_pattern_of_sixteen_bits_is_scaled_as_by_numpy(name, factor):
    source = from_bits(np.arange(1 << 16), name)
    factor = np.float32(factor)
    assert_same(scaled([source.copy()], name, [factor])[0], multiplied(source, factor))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_pattern_of_sixteen_bits_is_squared_exactly(name):
    values = from_bits(np.arange(1 << 16), name)
    ones = np.ones(values.size, np.int64)
    each = values.ctypes.data + 2 * np.arange(values.size)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float64) ** 2
    assert_same(fast.unit_sums_of_squares(each, ones, ones, ones, name), expected)


def test_a_factor_of_one_leaves_a_tensor_alone_that_is_its_own_target(dtype):
    size = DTYPES[dtype].itemsize
    # a signalling NaN, which any multiply would make a quiet one
    pattern = {"float16": 0x7C01, "bfloat16": 0x7F81, "float32": 0x7F800001, "float64": 0x7FF0000000000001}[dtype]
    array = from_bits(np.full(20, pattern, f"u{size}"), dtype)
    before = bits(array).copy()
    assert np.array_equal(bits(scaled([array], dtype, [1.0])[0]), before)


def test_a_factor_of_one_copies_to_another_target(dtype):
    source = random_arrays(dtype, [333])[0]
    assert_same(scaled([source], dtype, [1.0], [np.zeros_like(source)])[0], source)


def test_an_empty_list_and_empty_tensors_are_nothing(dtype):
    assert summed([], dtype).size == 0
    empty = [np.empty(0, DTYPES[dtype])] * 3
    assert summed(empty, dtype).tolist() == [0, 0, 0]
    scaled(empty, dtype, [2.0] * 3)


def test_one_fault_among_many_elements_shows_in_its_own_sum_only(dtype):
    for fault in (math.nan, math.inf, -math.inf):
        arrays = random_arrays(dtype, [20000, 20000, 40])
        arrays[1][17000] = fault
        assert np.isfinite(summed(arrays, dtype)).tolist() == [True, False, True]


@given(st.permutations(range(6)), st.sampled_from(sorted(DTYPES)))
def test_the_order_of_tensors_orders_the_results_and_changes_none(order, name):
    arrays = random_arrays(name, [0, 1, 129, 5000, 40000, 17])
    assert_same(summed([arrays[i] for i in order], name), summed(arrays, name)[order])


@pytest.mark.parametrize("shape", SHAPES)
def test_units_are_summed_and_scaled_whatever_the_shape(dtype, shape):
    array = random_arrays(dtype, [math.prod(shape)])[0].reshape(shape)
    address, axes = addresses([array]), shapes([array])
    expected = [exact_sum(array[:, unit]) for unit in range(shape[1])]
    assert_close(fast.unit_sums_of_squares(address, *axes, dtype), expected, 2.0**-46)

    factors = np.random.default_rng(2).uniform(0.1, 2, shape[1]).astype(np.float32).astype(np.float64)
    product = multiplied(array, factors[:, None])
    padded = np.full(array.size + 2, 7, array.dtype)
    fast.scale_units(address, addresses([padded[1:]]), *axes, dtype, factors)
    assert_same(padded[1:-1], product.reshape(-1))
    assert padded[0] == padded[-1] == 7
    fast.scale_units(address, address, *axes, dtype, factors)
    assert_same(array, product)


def test_units_of_many_tensors_follow_each_other(dtype):
    arrays = [a.reshape(s) for a, s in zip(random_arrays(dtype, map(math.prod, SHAPES)), SHAPES, strict=True)]
    places, axes = addresses(arrays), shapes(arrays)
    alone = [fast.unit_sums_of_squares(addresses([a]), *shapes([a]), dtype) for a in arrays]
    assert_same(fast.unit_sums_of_squares(places, *axes, dtype), np.concatenate(alone))

    factors = np.random.default_rng(3).uniform(0.1, 2, axes[1].sum()).astype(np.float32).astype(np.float64)
    starts = np.cumsum([0, *axes[1]])
    expected = [multiplied(a, factors[i : i + a.shape[1], None]) for a, i in zip(arrays, starts[:-1], strict=True)]
    fast.scale_units(places, places, *axes, dtype, factors)
    for array, product in zip(arrays, expected, strict=True):
        assert_same(array, product)


def test_no_result_depends_on_the_number_of_threads(dtype, monkeypatch):
    def results(count):
        monkeypatch.setattr(threads, "_count", lambda: count)
        arrays = random_arrays(dtype, [1_500_000, 3, 700_001, *[1000] * 300])
        columns = (np.array([300]), np.array([5000]), np.array([1]))
        factors = np.linspace(0.1, 0.9, 5000).astype(np.float32).astype(np.float64)
        address = addresses(arrays[:1])
        first = [summed(arrays, dtype), fast.unit_sums_of_squares(address, *columns, dtype)]
        fast.scale_units(address, address, *columns, dtype, factors)
        return first + scaled(arrays, dtype, np.full(len(arrays), 0.3, np.float32))

    for one, many in zip(results(1), results(5), strict=True):
        assert np.array_equal(bits(one), bits(many))


@np.errstate(all="ignore")
def spiked(grad, moment, threshold, decay, clip):
    """`spike` by NumPy: (target, moment, count)."""
    g, v = grad.astype(np.float64), moment.astype(np.float64)
    over = clip & (g * g > threshold * v)
    target = kernels.round_once(np.where(over, np.sign(g) * np.sqrt(threshold * v), g), grad.dtype)
    after = decay * v + (1 - decay) * target.astype(np.float64) ** 2
    return target, np.minimum(after, np.finfo(np.float32).max).astype(np.float32), np.count_nonzero(over)


def spike(grads, moments, targets, after, *settings):
    places = (addresses(arrays) for arrays in (grads, moments, targets, after))
    return fast.spike(*places, sizes(grads), *settings).tolist()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("keep", [True, False], ids=["new moments", "same moments"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "into targets"])
def test_spikes_are_clipped_counted_and_remembered_as_by_numpy(narrow, clip, keep, in_place):
    grads = random_arrays(narrow, BORDERS)
    moments = [np.square(m, dtype=np.float32) for m in random_arrays("float32", BORDERS, seed=5)]
    targets = [np.full_like(g, 7) for g in grads]
    expected = [spiked(g, m, 1.7, 0.99, clip) for g, m in zip(grads, moments, strict=True)]
    before = [(g.copy(), m.copy()) for g, m in zip(grads, moments, strict=True)]
    after = [np.empty_like(m) for m in moments] if keep else moments
    counts = spike(grads, moments, grads if in_place else targets, after, narrow, 1.7, 0.99, clip)
    assert counts == [count for *_, count in expected]
    assert any(counts) == clip
    for grad, target, new, (clipped, moment, count) in zip(grads, targets, after, expected, strict=True):
        assert_same(new, moment)
        assert_same(grad if in_place else target, clipped if in_place or count else np.full_like(grad, 7))
    for grad, moment, (old, older) in zip(grads, moments, before, strict=True):
        assert in_place or np.array_equal(bits(grad), bits(old))
        assert not keep or np.array_equal(bits(moment), bits(older))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "into targets"])
def test_only_a_tensor_that_has_a_spike_is_written_and_then_all_of_it(narrow, in_place):
    grads = random_arrays(narrow, [50_000, 0, 50_000, 40])
    moments = [np.full(g.size, 1e9, np.float32) for g in grads]
    moments[2][20_000] = 1e-9
    targets = grads if in_place else [np.full_like(g, 7) for g in grads]
    expected = [spiked(g, m, 1.0, 0.99, True) for g, m in zip(grads, moments, strict=True)]
    counts = spike(grads, moments, targets, [np.empty_like(m) for m in moments], narrow, 1.0, 0.99, True)
    assert counts == [0, 0, 1, 0]
    for target, (clipped, _, count) in zip(targets, expected, strict=True):
        assert_same(target, clipped if in_place or count else np.full_like(target, 7))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("variance", [0.0, 1e-45, 1e-12, 0.3333, 2.7, 1e4, 3e38])
def test_spikes_of_every_pattern_of_sixteen_bits_are_rounded_once(name, variance):
    grad = from_bits(np.arange(1 << 16), name)
    moment = np.full(grad.size, variance, np.float32)
    target, after, count = spiked(grad, moment, 3.3, 0.9, True)
    assert spike([grad], [moment], [grad], [moment], name, 3.3, 0.9, True) == [count]
    assert_same(grad, target)
    assert_same(moment, after)


def test_four_threads_at_once_get_what_one_gets(dtype):
    arrays = random_arrays(dtype, [400_000, 100_000, 5, *[1000] * 100])
    expected_sums = summed(arrays, dtype)
    expected = scaled([a.copy() for a in arrays], dtype, np.full(len(arrays), 0.3, np.float32))
    start = threading.Barrier(4)

    def work(_):
        start.wait()
        for _ in range(10):
            assert np.array_equal(summed(arrays, dtype), expected_sums)
            own = scaled([a.copy() for a in arrays], dtype, np.full(len(arrays), 0.3, np.float32))
            assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(own, expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_an_error_in_one_block_reaches_the_caller_after_all_threads_have_stopped(monkeypatch):
    running = []

    def kernel(like, cuts, block, *arguments):
        running.append(block)
        if block == 3:
            raise MemoryError("block 3")
        running.remove(block)

    arrays = random_arrays("float64", [2_000_000])
    summed(arrays, "float64")
    monkeypatch.setitem(compiler._ready, (sums._sum_block, "float64"), kernel)
    monkeypatch.setattr(threads, "_count", lambda: 4)
    with pytest.raises(MemoryError, match="block 3"):
        summed(arrays, "float64")
    assert running == [3]


CHECK = """
import math, sys, tempfile, threading
import numpy as np
from clipcore.clipping import fast
from clipcore.clipping.fast import compiler, threads
assert "numba" not in sys.modules, "imported with the module"

def check():
    assert fast.available()
    x = np.arange(600_000, dtype=np.float32)
    address, one, size = np.array([x.ctypes.data]), np.ones(1, np.int64), np.array([x.size])
    total = fast.unit_sums_of_squares(address, one, one, size, "float32")[0]
    assert abs(total - math.fsum(np.square(x, dtype=np.float64))) <= 2.0**-47 * total, total
"""

READ_ONLY = """
def refuse(*arguments, **options):
    raise PermissionError("read-only file system")
tempfile.TemporaryFile = refuse  # with which Numba tries folders; permissions would not stop root
"""


def run(script, environment=None, *options):
    """A script after CHECK, in an interpreter in which a warning is an error; fails with what it printed."""
    process = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", CHECK + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    return process.stdout


def test_a_forked_child_computes_though_its_parents_threads_stayed_behind():
    run(
        """
        import multiprocessing, os, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forking with threads
        threads._count = lambda: 4
        check()
        assert threads._pool is not None
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=check) for _ in range(4)]
        for child in children:
            child.start()
        check()
        for child in children:
            child.join()
            assert child.exitcode == 0, child.exitcode
        """
    )


def test_a_fork_waits_for_a_compilation_in_another_thread(tmp_path):
    run(
        """
        import multiprocessing, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        fast.available()
        thread = threading.Thread(target=check)
        thread.start()
        time.sleep(0.2)
        child = multiprocessing.get_context("fork").Process(target=check)
        child.start()
        child.join(120)
        assert child.exitcode == 0, child.exitcode
        thread.join()
        """,
        {"NUMBA_CACHE_DIR": str(tmp_path)},
    )


def test_a_call_at_exit_works_without_new_threads():
    run(
        """
        import atexit
        threads._count = lambda: 4
        check()
        atexit.register(check)
        threading._register_atexit(check)
        """
    )


def test_where_no_folder_can_be_written_kernels_are_compiled_in_memory():
    run(READ_ONLY + "check()")


def test_an_unusable_cache_folder_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    run("check()", {"NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache")})


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    run("check()", {"NUMBA_CACHE_DIR": str(folder)})
    return folder


@pytest.fixture
def cache(filled_cache, tmp_path):
    return shutil.copytree(filled_cache, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_cache_is_no_error(cache, kind):
    run(
        f"""
        from pathlib import Path
        whole = {{path: path.read_bytes() for path in Path({str(cache)!r}).rglob("*.nb?")}}
        for damage in (lambda b: b"", lambda b: b[: len(b) // 2], lambda b: bytes(len(b))):
            for path, content in whole.items():
                path.write_bytes(damage(content) if path.suffix == ".{kind}" else content)
            compiler._ready.clear()
            check()
        assert any(path.suffix == ".{kind}" for path in whole)
        """,
        {"NUMBA_CACHE_DIR": str(cache)},
    )


def test_a_filled_cache_is_used_and_left_as_it_is(cache):
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*.nb?")}
    assert {file.name.partition(".")[0] for file in before} == {"plans", "sums"}
    run("check()", {"NUMBA_CACHE_DIR": str(cache)})
    assert before == {file: file.stat().st_mtime_ns for file in cache.rglob("*.nb?")}


def test_a_change_in_any_file_of_the_package_makes_the_cache_another(cache, tmp_path, monkeypatch):
    version = compiler._version()
    assert all(version in file.name for file in cache.rglob("*.nb?"))
    copy = shutil.copytree(Path(compiler.__file__).parent, tmp_path / "fast")
    monkeypatch.setattr(compiler, "__file__", str(copy / "compiler.py"))
    assert compiler._version.__wrapped__() == version
    for path in copy.glob("*.py"):
        path.write_text(path.read_text() + "# changed")
        assert version != (version := compiler._version.__wrapped__())


def test_a_read_only_cache_is_no_error(cache):
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    run(READ_ONLY + "check()", {"NUMBA_CACHE_DIR": str(cache)})


@pytest.mark.parametrize(
    ("prelude", "environment"),
    [
        ("sys.modules['numba'] = None", {}),
        ("", {"NUMBA_DISABLE_JIT": "1"}),
        ("", {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}),
    ],
)
def test_without_a_numba_that_can_compile_them_the_kernels_are_not_available(prelude, environment):
    if environment.get("NUMBA_CPU_NAME") and os.uname().machine != "x86_64":
        environment = {"NUMBA_DISABLE_JIT": "1"}  # only x86 has processors without float16
    run(f"{prelude}\nassert fast.available() is False", environment)
