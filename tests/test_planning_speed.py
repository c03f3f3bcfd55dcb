"""`koclip plan --machine`: prices fitted to measured steps predict other runs; and peaks are those of the steps."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_planning import pretraining, stages_of

from koclip.config import ConfigError, PlanConfig, TokenizerConfig
from koclip.planning import speed
from koclip.planning.plan import plan

PRICES = {"fp32": 2e-11, "bf16": 5e-12, "written": 1e-10, "calls": 1e-6}
WORKS = [
    speed.Work("fp32", 1e10, 1e9, 1_000, peak=1e8),
    speed.Work("fp32", 1e9, 4e9, 9_000, peak=4e8),
    speed.Work("bf16", 3e10, 2e9, 4_000, peak=2e8),
    speed.Work("bf16", 4e9, 1e8, 7_000, peak=3e8),
]


def measured(work: speed.Work) -> speed.Measured:
    """A stage on a machine with known prices, 64 MiB of base and a factor of 1.25."""
    seconds = PRICES[work.precision] * work.flops + PRICES["written"] * work.written + PRICES["calls"] * work.calls
    return speed.Measured("a run", work, seconds, 2**26 + 1.25 * work.peak)


def test_prices_that_were_fitted_predict_other_runs():
    machine = speed.fit([measured(work) for work in WORKS])
    assert machine.prices == pytest.approx(PRICES)
    assert machine.memory == pytest.approx((2**26, 1.25))
    other = speed.Work("bf16", 7e9, 3e8, 2_500, peak=7e8)
    assert machine.seconds(other) == pytest.approx(measured(other).seconds)
    assert machine.peak(other) == pytest.approx(measured(other).peak)


def test_fewer_runs_fit_fewer_prices():
    single, double = (speed.fit([measured(work) for work in WORKS[:count]]) for count in (1, 2))
    assert single.prices == pytest.approx({"fp32": measured(WORKS[0]).seconds / 1e10})
    assert single.memory == pytest.approx((0, measured(WORKS[0]).peak / 1e8))
    assert double.prices.keys() == {"fp32", "written"}
    assert [double.seconds(work) for work in WORKS[:2]] == pytest.approx([measured(w).seconds for w in WORKS[:2]])
    with pytest.raises(ConfigError, match=r"^machine: got no run in bf16"):
        double.seconds(WORKS[2])


def test_a_machine_file_predicts_a_run(tmp_path: Path):
    run = pretraining(tokenizer=TokenizerConfig(max_tokens=16), batch_size=4, num_steps=1_000)
    file = str(tmp_path / "machine.json")
    stage = plan(PlanConfig(run="planned", steps=2, machine=file), run)["stages"][0]
    result = plan(PlanConfig(run="planned", machine=file), run)
    predicted = result["stages"][0]["predicted"]
    for name in ("pairs_per_second", "memory_gib"):
        assert predicted[name] == pytest.approx(stage["measured"][name])
    assert result["total"]["hours"] == pytest.approx(4_000 / predicted["pairs_per_second"] / 3600)
    both = plan(PlanConfig(run="planned", machine=file, device="a100"), run)["total"]
    assert "kwh" not in both  # the watts of the A100 are not those of the machine
    plan(PlanConfig(run="planned", steps=1, machine=file), replace(run, train=replace(run.train, batch_size=8)))
    assert [stage.run for stage in speed.read(Path(file))] == ["planned"] * 2


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"format": 9, "measured": []}', '{"format": 1, "measured": [{}]}']
)
def test_a_machine_file_that_cannot_be_read_is_refused_before_work(tmp_path: Path, content: str | None):
    file = tmp_path / "machine.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^machine: got "):
        plan(PlanConfig(run="planned", machine=str(file)), pretraining())


def test_a_file_holds_a_single_machine(tmp_path: Path, monkeypatch):
    file = tmp_path / "machine.json"
    speed.add(file, [measured(WORKS[0])])
    before = file.read_bytes()
    monkeypatch.setattr(speed, "machine", lambda: {"device": "another"})
    with pytest.raises(ConfigError, match=r"^machine: got .*another"):
        speed.add(file, [measured(WORKS[1])])
    assert file.read_bytes() == before


def test_operations_of_micro_batches_and_of_the_optimizer():
    whole, cut = (stages_of(pretraining(batch_size=64, micro_batch_size=size))[0]["operations"] for size in (None, 8))
    assert cut["calls"] > 8 * whole["calls"]  # eight pieces, and each is embedded twice
    averaged = stages_of(pretraining(batch_size=64, ema_decay=0.9))[0]
    assert averaged["operations"]["written"] - whole["written"] == 1.5 * averaged["memory"]["average"]


def test_the_measured_peak_is_that_of_the_steps():
    """Memory that was given back before is not in it; other systems than Linux do not forget it."""
    run = pretraining(tokenizer=TokenizerConfig(max_tokens=16), batch_size=4, num_steps=1_000)
    before = stages_of(run, steps=1)[0]["measured"]["memory_gib"]
    del (large := {"tensor": torch.ones(2**28)})["tensor"]  # 1 GiB
    assert not large
    assert stages_of(run, steps=1)[0]["measured"]["memory_gib"] < before + (0.25 if sys.platform == "linux" else 1.25)
