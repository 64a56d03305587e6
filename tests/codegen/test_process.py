"""PyTorch's setting of fp32 products, where several threads of a process multiply at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from cl_compiler.runtime import loader
from cl_compiler.runtime.loader import forget_sizes, load_source, sizes_as_they_were
from tests import losses_zoo as zoo
from tests.ring.shards import emit_ring, run_group, split
from tests.tiles import emit
from tests.zoo_case import sample

CLIP = next(case for case in zoo.cases() if case.name == "clip")
SETTING = torch.backends.mkldnn.matmul
FILES = {
    library: emit(CLIP, dtype="float32", library=library, width=48)
    for library in ("blas", "onednn")
}


@pytest.fixture(params=["none", "ieee", "bf16", "tf32"])
def theirs(request: pytest.FixtureRequest):
    """The caller's setting."""
    found = SETTING.fp32_precision
    SETTING.fp32_precision = request.param
    yield request.param
    SETTING.fp32_precision = found


def test_files_share_what_they_know_of_it() -> None:
    one, other = (load_source(text, "test") for text in FILES.values())
    assert one._process is other._process
    assert one._process.setting is SETTING


def test_exact_products_go_before_others(theirs: str) -> None:
    """Whoever comes last and leaves first; then the setting is the caller's."""
    process = load_source(FILES["onednn"], "test")._process
    process.begin("bf16")
    assert SETTING.fp32_precision == "bf16"
    process.begin("ieee")
    assert SETTING.fp32_precision in ("ieee", "none")
    process.begin("bf16")
    process.end("bf16")
    assert SETTING.fp32_precision in ("ieee", "none")
    process.end("ieee")
    assert SETTING.fp32_precision == "bf16"
    process.end("bf16")
    assert SETTING.fp32_precision == theirs


def test_it_is_the_callers_after_threads_that_wanted_different_ones(theirs: str) -> None:
    modules = [load_source(text, "test") for text in FILES.values()]
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        try:
            for step in range(20):
                x, y = (torch.randn(40, 48, generator=draw).requires_grad_() for _ in "xy")
                module = modules[(seed + step) % 2]
                module.Loss.apply(x, y, torch.tensor(0.5))[0].backward()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert SETTING.fp32_precision == theirs


def test_nothing_is_tried_while_another_thread_multiplies_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would have its products made otherwise meanwhile."""
    module = load_source(FILES["onednn"], "test")
    module._exact_setting.cache_clear()
    module._process.begin("ieee")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", None)
            assert module._setting_for((40, 48), (40, 48)) == "ieee"
        assert not module._process.sizes and not module._exact_setting.cache_info().currsize
    finally:
        module._process.end("ieee")
    assert module._setting_for((40, 48), (40, 48)) == module._exact_setting()


def test_it_is_the_callers_after_ranks_that_are_threads() -> None:
    """Each file asks once how products are made, and several ranks ask at once."""
    before = SETTING.fp32_precision
    whole = sample(CLIP, 60, 70, 64, seed=7)
    cut = split(CLIP, 60, 70, (3, 2, 2))
    text = emit_ring(CLIP, "ring_travel", dtype="float32", width=64, strip=48, library="onednn")
    for turn in range(30):
        run_group(f"{text}\n# {turn}\n", whole, cut, dtype=torch.float32)
        assert SETTING.fp32_precision == before, turn


def test_a_list_is_what_it_was_after_measurements() -> None:
    module = load_source(FILES["onednn"], "test")
    sizes = module._process.sizes
    module._setting_for((5, 48), (5, 48))
    before = set(sizes)
    with sizes_as_they_were():
        forget_sizes()
        module._setting_for((6, 48), (6, 48))
        assert sizes != before
    assert sizes == before and sizes


def test_no_more_sizes_than_there_is_room_for() -> None:
    """However many threads bring new ones at once."""
    module = load_source(FILES["onednn"], "test")

    def bring(first: int) -> None:
        for number in range(100):
            module._setting_for((first + number, 48), (7, 48))

    threads = [threading.Thread(target=bring, args=(1000 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(module._process.sizes) == module.SIZES_BY_ONEDNN


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_is_not_told_what_threads_of_its_parent_want() -> None:
    process = load_source(FILES["onednn"], "test")._process
    before = SETTING.fp32_precision
    process.begin("bf16")
    try:
        child = os.fork()
        if not child:
            os._exit(0 if SETTING.fp32_precision == before and not process.wanted else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert process.wanted == ["bf16"]
    finally:
        process.end("bf16")


def test_an_error_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    process = load_source(FILES["onednn"], "test")._process
    before = SETTING.fp32_precision

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "own", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.begin("bf16")
    monkeypatch.undo()
    assert not process.wanted and SETTING.fp32_precision == before


def test_autocast_is_as_it_was_where_entering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_source(FILES["blas"], "test")

    def interrupted(wanted: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._process, "begin", interrupted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(KeyboardInterrupt), module._MatmulPrecision():
            pass
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_loads_files_though_a_thread_of_its_parent_was_loading_one() -> None:
    held, done = threading.Event(), threading.Event()

    def load() -> None:
        with loader._loading:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=load)
    thread.start()
    held.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(20)  # it would wait for a thread that it does not have
        load_source("NUMBER = 1", "child")
        os._exit(0)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
