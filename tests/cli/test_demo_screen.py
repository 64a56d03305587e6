"""Ctrl-C once, twice and where it is ignored; bars for people, lines for pipes."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest
from rich.console import Console

from cl_compiler.cli.demo.screen import Screen, interruptible


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_asks_and_the_second_raises() -> None:
    with interruptible() as interrupt:
        assert not interrupt.requested
        press_ctrl_c()
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()  # outside the block it is what it always was


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as interrupt:
            press_ctrl_c()
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_runs_without_a_handler() -> None:
    found: list[bool] = []

    def work() -> None:
        with interruptible() as interrupt:
            found.append(interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_terminal_gets_a_bar_and_a_pipe_a_line() -> None:
    def shown(is_terminal: bool) -> str:
        file = io.StringIO()
        screen = Screen(Console(file=file, force_terminal=is_terminal, width=100))
        with screen.bar("Training") as advance:
            advance("dense, rate 0.1", 3, 4)
        screen.say("word " * 40)
        return file.getvalue()

    assert "75%" in shown(True)
    assert "dense, rate 0.1" in shown(True)
    assert shown(False) == "Training ...\n" + "word " * 40 + "\n"


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cl_compiler.cli.demo.screen.time.monotonic", lambda: now)
    file = io.StringIO()
    with Screen(Console(file=file, width=100)).bar("Training") as advance:
        for done in range(1, 61):
            now += 1.0
            advance(f"step {done}", done, 60)
    lines = file.getvalue().splitlines()
    assert lines[0] == "Training ..."
    assert lines[1:3] == ["   17%  step 10", "   33%  step 20"]
    assert len(lines) == 7
