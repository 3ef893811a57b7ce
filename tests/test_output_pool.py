"""Large outputs of the CPU backend come from a pool that takes them back when they die."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import get_context
from warploom.ops.activation import swiglu
from warploom.ops.norm import rms_norm

#: Float32 tensors of 4 MiB: large enough for the pool.
ROWS, COLUMNS = 1024, 1024
MIB = 2**20
#: The pool's promise: 1 GiB, or a sixteenth of a smaller machine's memory.
MOST_KEPT_BYTES = min(2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16)


def filled(value: float, rows: int = ROWS) -> Tensor:
    """An output of the CPU backend of `rows` times 4 KiB, all of whose elements are `value`."""
    gate = torch.full((rows, COLUMNS), 100.0)  # silu(100) is 100
    return swiglu(gate, torch.full_like(gate, value / 100.0), backend="cpu")


def resident_bytes() -> int:
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child_computes(value: float, connection) -> None:  # type: ignore[no-untyped-def]
    connection.send(bool((filled(value) == value).all()))
    connection.close()


def test_a_dead_output_s_memory_serves_the_next_one():
    first = filled(1.0)
    address = first.data_ptr()
    del first
    assert filled(2.0).data_ptr() == address


def test_a_training_step_finds_the_memory_of_the_last_one():
    x = torch.randn(ROWS, COLUMNS, requires_grad=True)
    upstream = torch.randn(ROWS, COLUMNS)
    addresses = []
    for _ in range(3):
        out = rms_norm(x, backend="cpu")
        (grad,) = torch.autograd.grad(out, x, upstream)
        addresses.append({out.data_ptr(), grad.data_ptr()})
        del out, grad
    assert addresses[1] == addresses[0]
    assert addresses[2] == addresses[0]


def test_a_smaller_output_leaves_a_larger_one_s_memory_alone():
    large = filled(1.0, 2 * ROWS)
    address = large.data_ptr()
    del large
    small = filled(2.0)
    assert filled(3.0, 2 * ROWS).data_ptr() == address
    assert small.data_ptr() != address


def test_a_view_keeps_the_memory_of_its_base():
    base = filled(1.0)
    address, view = base.data_ptr(), base[3:5]
    del base
    other = filled(2.0)
    assert other.data_ptr() != address
    assert (view == 1.0).all()


def test_outputs_alive_together_do_not_share_memory():
    outputs = [filled(float(value)) for value in range(1, 9)]
    for value, output in enumerate(outputs, start=1):
        assert (output == value).all()


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 511, 513], ids=lambda rows: f"{rows * 4}KiB")
def test_every_length_holds_all_its_elements(rows):
    outputs = [filled(float(value), rows) for value in (1, 2, 3)]
    assert all((output == value).all() for value, output in enumerate(outputs, start=1))


def test_memory_kept_is_bounded():
    gc.collect()
    before = resident_bytes()
    size = 64 * MIB
    count = MOST_KEPT_BYTES // size + 4
    gate, up = (torch.ones(size // 4) for _ in range(2))
    outputs = [swiglu(gate, up, backend="cpu") for _ in range(count)]
    alive = resident_bytes()
    assert alive - before >= count * size
    del gate, up, outputs
    kept = resident_bytes() - before
    assert kept <= MOST_KEPT_BYTES + 32 * MIB
    assert kept >= MOST_KEPT_BYTES // 2


def test_threads_make_and_drop_outputs_at_once():
    wrong = []

    def work(value: float) -> None:
        for round_ in range(20):
            output = filled(value, ROWS // 2 + round_ % 3)
            if not (output == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_output_dies_on_another_thread():
    holder = [filled(1.0)]
    address = holder[0].data_ptr()
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert filled(2.0).data_ptr() == address


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's threads do not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_forked_child_has_outputs_of_its_own(one_thread):
    mine = filled(1.0)
    del mine
    kept = filled(3.0)
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child_computes, args=(5.0, sender))
    process.start()
    assert receiver.poll(60) and receiver.recv()
    process.join(60)
    assert process.exitcode == 0
    assert (kept == 3.0).all()


def test_a_process_ends_with_outputs_alive():
    program = (
        "import torch\n"
        "from warploom.ops.activation import swiglu\n"
        "x = torch.ones(1024, 1024)\n"
        "torch.kept = swiglu(x, x, backend='cpu')\n"
        "torch.dead = swiglu(x, x, backend='cpu')\n"
        "del torch.dead\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_output_can_be_saved_and_loaded():
    file = io.BytesIO()
    torch.save(filled(4.0), file)
    file.seek(0)
    assert (torch.load(file) == 4.0).all()


def test_an_output_can_move_to_shared_memory():
    output = filled(4.0).share_memory_()
    assert output.is_shared()
    assert (output == 4.0).all()


def test_an_output_is_written_in_place_and_seen_by_numpy():
    output = filled(4.0)
    array = output.numpy()
    output.add_(1.0)
    assert (array == 5.0).all()


def test_an_array_keeps_the_memory_of_its_tensor():
    output = filled(4.0)
    array = output.numpy()
    del output
    filled(9.0)
    assert (array == 4.0).all()


def test_an_output_can_shrink_and_not_grow():
    output = filled(4.0)
    assert (output.resize_(10, 10) == 4.0).all()
    with pytest.raises(RuntimeError, match="not resizable"):
        output.resize_(2 * ROWS, COLUMNS)


def test_inference_mode_marks_an_output():
    with torch.inference_mode():
        assert filled(1.0).is_inference()
    assert not filled(1.0).is_inference()


@pytest.mark.slow
def test_a_compiled_function_reuses_no_living_output():
    @torch.compile(fullgraph=True)
    def twice(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        first = swiglu(gate, up, backend="cpu")
        return first, swiglu(first, up, backend="cpu") + 1.0

    gate, up = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    first, second = twice(gate, up)
    again = twice(up, gate)
    del again
    expected = swiglu(gate, up, backend="reference")
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, swiglu(expected, up, backend="reference") + 1.0)
