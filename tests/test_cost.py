"""What watching costs: the evaluation of models of real size runs, with tiny ones, and nothing in it waits for the device."""

import json

import pytest
import typer

from evals import cost_sizes


@pytest.mark.slow
def test_the_cost_of_real_sizes_is_measured_with_tiny_models(tmp_path, monkeypatch):
    """Every figure is there; watching waits for the device as often as plain generation, and rewind makes more passes."""
    out = tmp_path / "sizes.json"
    monkeypatch.setattr(cost_sizes, "BETWEEN", (4, 8))
    with pytest.raises(typer.Exit) as ended:
        cost_sizes.main(out, models="llava-7b,qwen3-vl-8b", batches="2", new=12, limit=0.0, tiny_models=True)
    written = json.loads(out.read_text())
    assert written["meta"]["failed"] == {}
    assert ended.value.exit_code == 0
    figures = {name: each["value"] for name, each in written["figures"].items()}
    for model in ("llava-7b", "qwen3-vl-8b"):
        for policy in cost_sizes.POLICIES:
            assert figures[f"{model}_{policy}_time_ratio_batch_2"] > 0
            assert figures[f"{model}_{policy}_memory_ratio_batch_2"] > 0
        assert figures[f"{model}_mark_waits_per_token_more_batch_2"] == 0
        assert figures[f"{model}_mark_passes_ratio_batch_2"] == figures[f"{model}_rerank_passes_ratio_batch_2"] == 1
        assert figures[f"{model}_rewind_passes_ratio_batch_2"] > 1, "a phrase was rolled back"


def test_a_model_that_fails_costs_no_figure_of_another(tmp_path, monkeypatch):
    """What could not be measured is named in the file, and the exit code says so."""
    out = tmp_path / "sizes.json"
    monkeypatch.setitem(cost_sizes.SIZES, "broken", cost_sizes.SIZES["llava-7b"]._replace(text={"hidden_size": -1}))
    monkeypatch.setattr(cost_sizes, "tiny", lambda sizes: sizes)
    with pytest.raises(typer.Exit) as ended:
        cost_sizes.main(out, models="broken", batches="1", tiny_models=True)
    assert ended.value.exit_code == 1
    assert "broken" in json.loads(out.read_text())["meta"]["failed"]
