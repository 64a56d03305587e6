"""The benchmark itself: it runs end to end, and its figures and verdicts are what they claim."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import GROUPS, Case, cases_of
from benchmarks.claims import check_claims
from benchmarks.cpu import main
from benchmarks.measure import run_case
from benchmarks.providers import chunked_clip, gemm_loop, inputs_of, open_clip
from benchmarks.record import merge
from cl_compiler.cli.dense import DENSE, dense_clip
from cl_compiler.plan.types import Tile


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict, Path]:
    path = tmp_path_factory.mktemp("results") / "quick.json"
    failed = main(["--quick", "--threads", "1", "--repeats", "2", "--out", str(path),
                   "--only", "headline", "losses", "retain", "bf16"])  # fmt: skip
    return failed, json.loads(path.read_text()), path


def test_a_quick_run_measures_every_provider_of_every_case(quick):
    failed, content, path = quick
    assert failed == 0
    wanted = cases_of([1], only=["headline", "losses", "retain", "bf16"], repeats=2, quick=True)
    assert [case["key"] for case in content["cases"]] == [case.key for case in wanted]
    for case in content["cases"]:
        for name, row in case["rows"].items():
            if row["error"].startswith("skipped: "):
                assert name == "compiled:bf16" and "AMX" in row["error"]
                continue
            assert row["error"] == ""
            assert len(row["seconds"]) == len(row["foreign_cores"]) == 2
            assert min(row["seconds"]) > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_results_carry_what_a_comparison_needs(quick):
    _, content, _ = quick
    for case in content["cases"]:
        environment = case["environment"]
        assert environment["versions"]["torch"] == torch.__version__
        assert environment["machine"]["cores"] >= 1
        assert case["case"]["D"] == 32
    assert len(content["cases"][0]["environment"]["commit"]) in (0, 40)


def test_the_compiled_losses_compute_what_the_dense_formulas_do(quick):
    _, content, _ = quick
    errors = [
        row["gradient_error"]
        for case in content["cases"]
        for row in case["rows"].values()
        if "gradient_error" in row and row["plan"]["precision"] == "ieee"
    ]
    assert len(errors) >= 4
    assert max(errors) < 1e-4


def test_compiled_losses_hold_less_than_dense_ones(quick):
    _, content, _ = quick
    rows = next(c["rows"] for c in content["cases"] if c["case"]["loss"] == "nt_xent")
    assert rows["compiled:spill"]["live_bytes"] < rows["dense"]["live_bytes"]


def test_a_failing_provider_is_a_row_with_its_error():
    case = Case("headline", "clip", 64, 64, 16, 1, ("compiled", "dense"), "1KiB", 1)
    rows = run_case(case)["rows"]
    assert rows["compiled"]["error"].startswith("BudgetError: ")
    assert rows["dense"]["median_s"] > 0


def test_alternatives_agree_with_the_dense_formula():
    case = Case("headline", "clip", 96, 96, 24, 1, (), "1MiB", 1)
    inputs = inputs_of(case)

    def gradients(formula):
        value = formula(**inputs)
        return [value, *torch.autograd.grad(value, list(inputs.values()))]

    want = gradients(dense_clip)
    for formula in (open_clip, chunked_clip):
        torch.testing.assert_close(gradients(formula), want, rtol=1e-4, atol=1e-6)


def test_the_chunked_formula_has_several_chunks(monkeypatch):
    monkeypatch.setattr("benchmarks.providers.CHUNK_ROWS", 40)
    inputs = inputs_of(Case("headline", "clip", 96, 96, 24, 1, (), "1MiB", 1))
    torch.testing.assert_close(chunked_clip(**inputs), dense_clip(**inputs))


def test_features_are_unit_length_and_positives_stand_out():
    inputs = inputs_of(Case("headline", "clip", 128, 128, 256, 1, (), "1MiB", 1))
    x, y = inputs["x"].detach(), inputs["y"].detach()
    torch.testing.assert_close(x.norm(dim=1), torch.ones(128))
    similarity = x @ y.T
    assert similarity.diagonal().min() > similarity.fill_diagonal_(-1).max()


def test_dense_formulas_follow_their_definitions():
    z = torch.nn.functional.normalize(torch.randn(12, 8, dtype=torch.float64), dim=1)
    x, y = z[:6], z[6:]
    s = 5.0 * x @ y.T
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    rows = (s.logsumexp(1) - s.diagonal()).mean()
    cols = (s.logsumexp(0) - s.diagonal()).mean()
    torch.testing.assert_close(DENSE["clip"](x, y, logit_scale=scale), (rows + cols) / 2)
    torch.testing.assert_close(DENSE["infonce"](x, y, logit_scale=scale), rows)
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    want = F.softplus(-signs * (s + bias)).sum() / 6
    got = DENSE["siglip"](x, y, logit_scale=scale, logit_bias=bias)
    torch.testing.assert_close(got, want)
    whole = 5.0 * z @ z.T
    others = torch.stack([whole[i, torch.arange(12) != i].logsumexp(0) for i in range(12)])
    pairs = torch.stack([whole[i, (i + 6) % 12] for i in range(12)])
    torch.testing.assert_close(DENSE["nt_xent"](z, logit_scale=scale), (others - pairs).mean())


def test_the_gemm_loop_makes_four_units_of_products():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm_"):
                left, right = args[-2:]
                self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            else:
                assert "mm" not in name
            return func(*args, **(kwargs or {}))

    x, y = torch.randn(50, 8), torch.randn(70, 8)
    with Products() as counted:
        gemm_loop(x, y, Tile(32, 48))
    assert counted.flops == 4 * 2 * 50 * 70 * 8


def test_merging_replaces_a_case_that_is_measured_again(tmp_path):
    path = tmp_path / "r.json"
    merge(path, [{"key": "a", "v": 1}, {"key": "b", "v": 1}])
    content = merge(path, [{"key": "a", "v": 2}])
    assert {c["key"]: c["v"] for c in content["cases"]} == {"a": 2, "b": 1}
    assert json.loads(path.read_text()) == content


def test_verdicts_follow_the_figures():
    def case(group, loss="clip", **rows):
        of = {"group": group, "loss": loss, "N": 16384, "threads": 1, "budget": "1MiB"}
        return {"case": of, "rows": {n.replace("__", ":"): r for n, r in rows.items()}}

    def row(seconds, live=1, **more):
        return {"median_s": seconds, "live_bytes": live, **more}

    cases = [
        case("headline", compiled=row(1.0, 10, gemm_fraction=0.9), dense=row(1.8, 500)),
        case("losses", compiled__spill=row(1.0)),
        case("losses", "infonce", compiled__panel=row(0.9)),
        case("retain", compiled__retain=row(1.0), compiled__spill=row(1.05)),
        case("small", compiled={"error": "x"}, dense=row(1.0)),
    ]
    verdicts = {c.text.split(",")[0]: c.verdict for c in check_claims(cases)}
    assert verdicts == {
        "clip: dense time / compiled time": "met",
        "clip: fraction of the bare GEMM loop": "met",
        "clip: memory / dense memory": "met",
        "infonce by panel / clip": "MISSED",
        "spill time / retain time": "met",
        "small batch: dense time / compiled": "not measured",
    }


def test_two_threads_are_promised_more_than_one():
    of = {"group": "headline", "loss": "clip", "N": 8192, "budget": "1MiB"}
    rows = {"compiled": {"median_s": 1.0}, "dense": {"median_s": 2.0}}
    cases = [{"case": of | {"threads": threads}, "rows": rows} for threads in (1, 2)]
    one, two = (c for c in check_claims(cases) if c.measured == 2.0)
    assert (one.verdict, two.verdict) == ("met", "MISSED")


def test_every_group_has_cases():
    assert {case.group for case in cases_of([1, 2])} == set(GROUPS)
    keys = [case.key for case in cases_of([1, 2], long=True)]
    assert len(keys) == len(set(keys))


def test_interleaving_survives_a_call_that_raises():
    from cl_compiler.runtime.measure import interleave

    order = []

    def good():
        order.append("good")
        time.sleep(0.25)

    def bad():
        order.append("bad")
        raise RuntimeError("out of luck\nat length")

    found = interleave({"good": good, "bad": bad}, 2, clock="wall")
    assert found["bad"].error == "RuntimeError: out of luck" and found["bad"].median_s is None
    assert found["good"].median_s == pytest.approx(0.25, abs=0.1)
    assert order == ["good", "bad", "good", "good"]


def test_disturbed_repetitions_do_not_count_while_clean_ones_remain():
    from cl_compiler.runtime.measure import Sample, Timing

    clean, dirty = Sample(1.0, 1.0, 0.0), Sample(9.0, 9.0, 1.0)
    assert Timing((clean, dirty)).median_s == 1.0
    assert Timing((clean, dirty, dirty)).median_s == 9.0
    assert Timing((clean, dirty, dirty)).dirty_count == 2
