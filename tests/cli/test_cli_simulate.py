"""``simulate``: every schedule on a cluster that is not here."""

from __future__ import annotations

import pytest

CLUSTER = ["--hardware", "a800-4x8", "--problem", "32768x256"]


def test_json_and_table_have_every_schedule(cli, cli_json):
    found = cli_json("simulate", *CLUSTER)
    assert found["ranks"] == 32
    seconds = {name: s["seconds"] for name, s in found["schedules"].items()}
    assert set(seconds) == {"ring_owner", "ring_travel", "all_gather", "two_level"}
    assert found["fastest"] == min(seconds, key=seconds.get)
    text = cli("simulate", *CLUSTER).stdout
    assert "32 ranks with shards of 1024 x 1024" in text
    assert all(name in text for name in (*seconds, "Inf-CL", "bound by"))


def test_ranks_of_a_machine_and_a_chart(cli, cli_json, tmp_path):
    path = tmp_path / "chart.png"
    machine = ["--hardware", "xeon-amx-2c", "--ranks", "3", "--dtype", "float32"]
    machine += ["--problem", "3000x64"]
    found = cli_json("simulate", *machine, "--gantt", str(path))
    assert found["ranks"] == 3
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize("loss", ["nt_xent", "siglip"])
def test_other_losses(cli_json, loss):
    found = cli_json("simulate", *CLUSTER, "--loss", loss)
    assert all(s["seconds"] > 0 for s in found["schedules"].values())
