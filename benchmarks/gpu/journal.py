"""The results file while it grows, and a note beside it of what is being done right now.

Everything is on disk as soon as it exists: whoever kills a run loses the measurement in hand, and
the note says which that was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.record import load, save

__all__ = ["Journal", "read_note"]

Entry = dict[str, Any]


class Journal:
    """One run's view of a results file.

    The file holds ``runs`` (by id: device, versions, clocks) and ``cases`` (by key: rows by
    provider).  An entry is ``done`` when nothing is left to measure in it.
    """

    def __init__(self, path: Path, run: str, *, resume: bool = False) -> None:
        self.path, self.run, self.resume = path, run, resume
        self.content = load(path, of_gpu=True)

    @property
    def note_path(self) -> Path:
        """Where the note of the measurement in hand lies."""
        return self.path.with_suffix(".now")

    def begin_run(self, described: Mapping[str, Any]) -> None:
        """Record what this run runs on; the first worker of a run does so.

        Raises:
            ValueError: the file holds another device's results.
        """
        name = described["device"]["name"]
        others = {r["device"]["name"] for r in self.content["runs"].values()} - {name}
        if others:
            raise ValueError(
                f"{self.path.name} holds results of {', '.join(sorted(others))}, this is {name}; "
                "give another file with --out"
            )
        self.content["runs"].setdefault(self.run, dict(described))
        self.save()

    def end_run(self, **more: Any) -> None:
        """Add to what is known of this run."""
        self.content["runs"].get(self.run, {}).update(more)
        self.save()

    def entry(self, key: str) -> Entry | None:
        """This run's entry, or where that is resumed an earlier run's; else None."""
        found = [e for e in self.content["cases"] if e["key"] == key]
        own = (e for e in found if e["run"] == self.run)
        return next(own, found[-1] if found and self.resume else None)

    def is_own(self, key: str) -> bool:
        """Whether this run has an entry."""
        return any((e["key"], e["run"]) == (key, self.run) for e in self.content["cases"])

    def kept(self, key: str, *, finished: bool) -> dict[str, Entry]:
        """Rows of this run that an earlier worker left and that are not measured again.

        Args:
            key: of the case.
            finished: all of them; else those of providers that took their worker down.
        """
        rows = (self.entry(key) or {"rows": {}})["rows"] if self.is_own(key) else {}
        return {name: row for name, row in rows.items() if finished or row.get("fatal")}

    def strikes(self, provider: str) -> int:
        """How often a provider has taken this run's worker down."""
        mine = (e for e in self.content["cases"] if e["run"] == self.run)
        return sum(bool(e["rows"].get(provider, {}).get("fatal")) for e in mine)

    def write(self, entry: Entry) -> None:
        """Put an entry in place of the earlier one with its key, and save.

        Limits of another run stay: they are what that run's rates are fractions of.
        """
        entry["run"] = self.run
        cases = self.content["cases"]
        is_limit = entry.get("section") == "ceilings"
        for index, other in enumerate(cases):
            stays = is_limit and other["done"] and other["run"] != self.run
            if other["key"] == entry["key"] and not stays:
                cases[index] = entry
                break
        else:
            cases.append(entry)
        self.save()

    def save(self) -> None:
        save(self.path, self.content)

    def explain(self, key: str, provider: str, trace: str) -> None:
        """Keep an error in full in a text file beside the results, whose rows have one line.

        It is for whoever repairs the provider, and names paths of this machine.
        """
        with self.path.with_suffix(".errors.txt").open("a", encoding="utf-8") as file:
            file.write(f"==== {self.run} {key}: {provider}\n{trace}\n")

    @contextmanager
    def doing(self, key: str, provider: str) -> Iterator[None]:
        """Leave a note while something runs that may never come back."""
        note = {"key": key, "provider": provider, "since": time.time(), "run": self.run}
        temporary = self.note_path.with_suffix(".now.tmp")
        temporary.write_text(json.dumps(note), encoding="utf-8")
        temporary.replace(self.note_path)
        yield
        self.note_path.unlink(missing_ok=True)  # not in a finally: what kills this must leave it

    def blame(self, note: Mapping[str, Any], error: str) -> None:
        """Write down what a provider did that took the worker with it."""
        entry = self.entry(note["key"])
        if entry is None or entry["run"] != self.run:
            return
        entry["rows"].setdefault(note["provider"], {})
        entry["rows"][note["provider"]] |= {"error": error, "fatal": True}
        self.save()
        self.note_path.unlink(missing_ok=True)


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a measurement in hand, if there is one."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found
