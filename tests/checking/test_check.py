"""`gpt2ml check` passes the shipped model and tells a wrong conversion of it from the right one."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2ml_torch import GPT2ML, Tokenizer, kernels
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.checking import Finding, arithmetic, check_model, language
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers.mutants import OF_CODE, OF_WEIGHTS, UNSEEN, State

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


def failed(path: Path) -> list[str]:
    """The names of the findings that fail, what concerns the machine left out."""
    with ModelFile.open(path) as file:
        findings = list(check_model(file, precisions=False))
    return [finding.name for finding in findings if finding.verdict == "fail"]


def save(path: Path, state: State, model: GPT2ML, tokenizer: Tokenizer) -> Path:
    mutant = GPT2ML(model.config)
    mutant.load_state_dict(state)
    mutant.save_pretrained(path, tokenizer=tokenizer, allow_non_finite=True)
    return path


@pytest.fixture(scope="module")
def right(shipped_model: Path) -> tuple[GPT2ML, Tokenizer]:
    return GPT2ML.from_pretrained(shipped_model), Tokenizer.from_pretrained(shipped_model)


def test_the_shipped_model_passes(shipped_model: Path) -> None:
    assert failed(shipped_model) == []


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_a_wrong_conversion_fails(
    name: str, right: tuple[GPT2ML, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = right
    mutate, finding = OF_WEIGHTS[name]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    mutate(state)
    assert finding in failed(save(tmp_path / "mutant.safetensors", state, model, tokenizer))


@pytest.mark.parametrize(
    "name",
    [
        "queries and keys exchanged",
        "square kernels not transposed",
        "norms of each block exchanged",
        "blocks one earlier",
        "positions one later",
        "all weights random",
    ],
)
def test_a_wrong_conversion_fails_where_only_few_tokens_are_read_from_packed_weights(
    name: str,
    right: tuple[GPT2ML, Tokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language, "LARGE", 0)
    model, tokenizer = right
    mutate, _ = OF_WEIGHTS[name]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    mutate(state)
    found = failed(save(tmp_path / "mutant.safetensors", state, model, tokenizer))
    assert {"order of the weights", "vocabulary and language"} & set(found)


@pytest.mark.skipif(not kernels.load_kernels(), reason="the kernels could not be built")
def test_wrong_kernels_are_not_taken_for_wrong_weights(
    shipped_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "LARGE", 0)
    assert failed(shipped_model) == []

    def wrong(x: torch.Tensor, *_: object, outputs: int, **__: object) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], outputs)

    monkeypatch.setattr(kernels.modules, "packed_linear", wrong)
    assert failed(shipped_model) == ["kernels"]


@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_table_calls_unseen_passes(
    name: str, right: tuple[GPT2ML, Tokenizer], tmp_path: Path
) -> None:
    """Should a check learn to see it, docs/checking.md must say so."""
    model, tokenizer = right
    state = {key: value.clone() for key, value in model.state_dict().items()}
    UNSEEN[name](state)
    assert failed(save(tmp_path / "mutant.safetensors", state, model, tokenizer)) == []


def test_another_vocabulary_of_the_same_size_fails(
    right: tuple[GPT2ML, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = right
    tokens = list(tokenizer.vocab_text.removesuffix("\n").split("\n"))
    other = Tokenizer(
        [*tokens[:104], *sorted(tokens[104:])], num_embeddings=tokenizer.num_embeddings
    )
    model.save_pretrained(tmp_path / "mutant.safetensors", tokenizer=other)
    assert failed(tmp_path / "mutant.safetensors") == ["vocabulary and language"]


@pytest.mark.parametrize("name", OF_CODE)
def test_code_that_computes_another_function_fails(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arithmetic.check_arithmetic().verdict == "pass"
    load = GPT2ML.load_state_dict

    def mutated(model: GPT2ML, *arguments: object, **options: object) -> None:
        load(model, *arguments, **options)  # type: ignore[arg-type]
        OF_CODE[name](model)

    monkeypatch.setattr(GPT2ML, "load_state_dict", mutated)
    assert arithmetic.check_arithmetic().verdict == "fail"


def test_rivals_leave_the_model_as_it_was(right: tuple[GPT2ML, Tokenizer]) -> None:
    model, tokenizer = right
    ids = torch.tensor([tokenizer.encode("国破山河在，城春草木深。")])
    with torch.no_grad():
        before = model(ids)
        losses = language.rival_losses(model, ids)
        assert torch.equal(model(ids), before)
    assert len(set(losses.values())) == len(losses)


def test_the_table_in_the_documentation_names_every_mutant() -> None:
    text = (ROOT / "docs" / "checking.md").read_text(encoding="utf-8")
    for name in [*OF_WEIGHTS, *UNSEEN, *OF_CODE, "another vocabulary"]:
        assert f"| {name} |" in text, name


def run(*words: object) -> int:
    return main(["check", *map(str, words)])


def test_the_command_measures_every_precision_and_recommends_one(
    shipped_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.md"
    source = ROOT / "checkpoints" / "demo"
    assert run(shipped_model, "--json", "--source", source, "--report", report) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    findings = {finding["name"]: finding for finding in result["findings"]}
    assert findings["precision float32"]["values"]["tokens_per_second"] > 0
    assert findings["what to take"]["values"]["precision"] in (
        "float32",
        "bfloat16",
        "int8",
        "int4",
    )
    assert findings["source"]["verdict"] == "pass"
    text = report.read_text(encoding="utf-8")
    assert "passed" in text
    for private in (str(Path.home()), str(shipped_model.parent), str(ROOT)):
        assert private not in text + json.dumps(result)


def test_a_file_that_is_not_the_checkpoints_fails_against_its_source(
    right: tuple[GPT2ML, Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = right
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["blocks.4.mlp.up.bias"][7] += 1e-6
    path = save(tmp_path / "changed.safetensors", state, model, tokenizer)
    assert run(path, "--no-precisions", "--source", ROOT / "checkpoints" / "demo") == 1
    out = capsys.readouterr().out
    assert "FAIL source: 1 tensor is not the checkpoint's in float32: blocks.4.mlp.up.bias" in out


def test_the_optimizers_statistics_are_held_against_the_checkpoint_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, source = tmp_path / "kept.safetensors", ROOT / "checkpoints" / "demo"
    assert main(["convert", str(source), str(path), "--keep-optimizer"]) == 0
    assert run(path, "--no-precisions", "--source", source) == 0
    assert "bit for bit, and so are 102 of the optimizer" in capsys.readouterr().out
    with ModelFile.open(path) as file:
        name = next(iter(file.slots))
        start = file.slots[name].start
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)
    assert run(path, "--no-precisions", "--source", source) == 1
    assert f"FAIL source: 1 tensor is not the checkpoint's in float32: {name}" in (
        capsys.readouterr().out
    )


def test_a_damaged_source_fails_in_one_line_and_no_report_names_its_place(
    shipped_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(ROOT / "checkpoints" / "demo", tmp_path / "damaged"))
    data = next(source.glob("*.data-*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    report = tmp_path / "report.md"
    words = ("--no-precisions", "--source", source, "--report", report)
    assert run(shipped_model, *words) == 1
    out, error = capsys.readouterr()
    assert "FAIL source: the checkpoint could not be converted again\n" in out
    assert error.startswith("gpt2ml: error: tensor 'newslm/")
    assert f"of {source}" in error
    assert "is damaged: its checksum is wrong" in error
    assert error.count("\n") == 1
    assert str(tmp_path) not in out + report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("option", "words"),
    [("--report", "No such file or directory"), ("--source", "does not exist")],
)
def test_a_place_that_is_not_there_is_refused_before_the_work(
    option: str,
    words: str,
    shipped_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(shipped_model, option, tmp_path / "absent" / "x.md") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


def test_a_report_never_replaces_the_model(
    shipped_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = shipped_model.stat().st_size
    assert run(shipped_model, "--no-precisions", "--report", shipped_model) == 2
    assert "--report is the model itself" in capsys.readouterr().err
    assert shipped_model.stat().st_size == before


def test_too_few_positions_are_not_blamed_on_the_vocabulary(
    right: tuple[GPT2ML, Tokenizer], tmp_path: Path
) -> None:
    config = dataclasses.replace(right[0].config, max_position_embeddings=5, num_hidden_layers=1)
    path = tmp_path / "short.safetensors"
    GPT2ML(config).save_pretrained(path, tokenizer=right[1])
    with ModelFile.open(path) as file:
        texts = [f.text for f in check_model(file, precisions=False) if f.verdict == "fail"]
    assert texts[-1] == "the model has no positions for a sentence of 8 tokens"


def test_a_flipped_bit_fails_by_name(shipped_model: Path, tmp_path: Path) -> None:
    data = bytearray(shipped_model.read_bytes())
    data[-1000] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(data)
    with ModelFile.open(tmp_path / "flipped.safetensors") as file:
        findings = [f for f in check_model(file, precisions=False) if f.verdict == "fail"]
    assert [finding.name for finding in findings] == ["checksums"]
    assert "output_norm" in findings[0].text or "blocks.5" in findings[0].text


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_packed_file_is_checked_too(
    precision: str, shipped_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "packed.safetensors"
    assert main(["quantize", str(shipped_model), "--to", precision, "--out", str(path)]) == 0
    assert failed(path) == []


def test_a_container_and_ulimit_bound_the_free_memory(tmp_path: Path) -> None:
    from gpt2ml_torch.checking import machine

    for name, text in (
        ("max", "3000\n"),
        ("current", "2500\n"),
        ("stat", "anon 2000\ninactive_file 400\nactive_file 1\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine._free_in_container(tmp_path) == 900
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._free_in_container(tmp_path) is None
    assert machine._free_in_container(tmp_path / "absent") is None


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is read from /proc")
def test_precisions_that_do_not_fit_the_memory_are_not_tried(shipped_model: Path) -> None:
    code = (
        "import resource, sys, torch; from gpt2ml_torch.__main__ import main; "
        "torch.ones(3) + 1; size = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        "resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20,) * 2); "
        "sys.exit(main(['check', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(shipped_model)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "precision float32: not tried: the weights don't fit the free memory" in done.stdout


def test_float64_widens_one_layer_at_a_time(right: tuple[GPT2ML, Tokenizer]) -> None:
    from gpt2ml_torch.checking import machine

    model = copy.deepcopy(right[0])
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(ids)
        machine._compute_in(torch.float64, model)
        assert torch.equal(model(ids), expected)
    assert model.get_parameter("blocks.0.mlp.up.weight").dtype == torch.float32


def test_wrong_kernels_fail_by_precision(shipped_model: Path) -> None:
    from gpt2ml_torch.checking import machine

    measured = machine.Measured(
        precision=machine.Precision.BFLOAT16,
        divergence=0.0,
        error=1.0,
        plain_error=0.01,
        rounding=0.01,
        moved=0.1,
        tokens_per_second=1.0,
        weight_bytes=1,
    )
    finding: Finding = machine._judge(measured, bandwidth=1e9)
    assert finding.verdict == "fail"
    assert "kernels" in finding.text
