"""The command line: what it prints, what it writes, and one line for every mistake."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import clip_jax
from clip_jax.cli import main
from clip_jax.convert import convert
from clip_jax.convert.source import open_source
from tests.checkpoints import TINY, digests, hf_state, write_text_encoder

SCRIPT = Path(sys.executable).parent / "clip-jax"
LONG = " ".join(["cat"] * 80)


@pytest.fixture(scope="module")
def model(tiny_sd15, tmp_path_factory) -> Path:
    """The small pipeline, converted. Read only."""
    return convert(tiny_sd15, tmp_path_factory.mktemp("model") / "sd15", family="sd15")


@pytest.fixture
def embed(model, capsys):
    """Runs `clip-jax embed` on the small model; returns its lines."""

    def run(*arguments):
        assert main(["embed", "--model", str(model), *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.splitlines()

    return run


def fails(capsys, *arguments):
    """Runs a command that must fail; returns the one line on stderr."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("clip-jax: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("clip-jax: error: ")


def type_in(monkeypatch, content: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


# --- embed


def check_rows(lines, array, texts):
    """The lines that describe an array, compared with numpy."""
    title, *rows = lines
    assert title == f"prompt_embeds {array.shape} {array.dtype}"
    assert len(rows) == len(array) == len(texts)
    for line, row, (kind, text) in zip(rows, array, texts, strict=True):
        found = re.fullmatch(r"  (cond|uncond) +norm +(\d+\.\d{4})  ends ((?: *-?\d+\.\d{4}){3})  (.*)", line)
        assert (found[1], found[4]) == (kind, repr(text))
        assert float(found[2]) == pytest.approx(np.linalg.norm(row.astype(np.float32)), abs=1e-4)
        np.testing.assert_allclose(np.array(found[3].split(), float), row.ravel()[-3:].astype(float), atol=1e-4)


def test_one_prompt(embed, encoder):
    *rows, timing = embed("a cat")
    check_rows(rows, np.asarray(encoder("a cat").prompt_embeds), [("uncond", ""), ("cond", "a cat")])
    assert re.fullmatch(r"tokenise \d+\.\d ms, compile \d+\.\d\d s, run \d+\.\d ms", timing)


def test_a_negative_prompt_is_for_all_prompts(embed, encoder, monkeypatch):
    type_in(monkeypatch, b"a cat\na dog\n")
    *rows, _ = embed("-", "--negative", "blurry")
    check_rows(
        rows,
        np.asarray(encoder(["a cat", "a dog"], "blurry").prompt_embeds),
        [("uncond", "blurry"), ("uncond", "blurry"), ("cond", "a cat"), ("cond", "a dog")],
    )


def test_without_guidance_there_are_no_unconditional_rows(embed, encoder):
    *rows, _ = embed("a cat", "--no-guidance")
    check_rows(rows, np.asarray(encoder("a cat", guidance=False).prompt_embeds), [("cond", "a cat")])


def test_clip_skip(embed, encoder):
    *rows, _ = embed("a cat", "--clip-skip", "1")
    array = np.asarray(encoder("a cat", clip_skip=1).prompt_embeds)
    check_rows(rows, array, [("uncond", ""), ("cond", "a cat")])
    assert rows[2] != embed("a cat")[2]


def test_an_empty_prompt_is_a_prompt(embed):
    rows = embed("", "--no-guidance")
    assert rows[1].endswith("  ''")


LINES = ["a cat", "", "  two dogs ", "naïve \u2028 café"]


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "stdin"])
@pytest.mark.parametrize(
    ("mark", "between", "end"),
    [("", "\n", "\n"), ("", "\n", ""), ("\ufeff", "\r\n", "\r\n")],
    ids=["unix", "no newline at the end", "windows"],
)
def test_prompts_are_the_lines_of_a_file(embed, tmp_path, monkeypatch, mark, between, end, from_file):
    content = (mark + between.join(LINES) + end).encode()
    (tmp_path / "prompts").write_bytes(content)
    type_in(monkeypatch, content)
    lines = embed(*(["--file", tmp_path / "prompts"] if from_file else ["-"]), "--no-guidance")
    assert lines[0] == "prompt_embeds (4, 77, 32) float32"
    assert [re.sub(r" +cond .* ends( +\S+){3}  ", "", line) for line in lines[1:5]] == [repr(x) for x in LINES]


def test_a_dash_is_only_special_by_itself(embed):
    assert embed("--no-guidance", "--", "--a cat")[1].endswith("  '--a cat'")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_holds_what_the_api_gives(embed, tiny_sd15, tmp_path, suffix, dtype):
    out = tmp_path / f"embeds{suffix}"
    *rows, _, wrote = embed("a cat", "--negative", "b", "--dtype", dtype, "--out", out)

    encoder = clip_jax.load(tiny_sd15, family="sd15", dtype=dtype)
    expected = np.asarray(encoder("a cat", "b").prompt_embeds)
    assert wrote == f"wrote {out}"
    check_rows(rows, expected, [("uncond", "b"), ("cond", "a cat")])
    if suffix == ".npz":
        with np.load(out) as file:
            found = dict(file)
        if dtype == "bfloat16":  # which the format lacks
            expected = expected.astype(np.float32)
    else:
        source = open_source(out)
        found = {name: tensor.read() for name, tensor in source.state.items()}
    assert found.keys() == {"prompt_embeds"}
    np.testing.assert_array_equal(found["prompt_embeds"], expected, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_safetensors_keep_bfloat16(embed, tmp_path):
    embed("a cat", "--dtype", "bfloat16", "--out", tmp_path / "a.safetensors")
    assert open_source(tmp_path / "a.safetensors").state["prompt_embeds"].dtype == ml_dtypes.bfloat16


def test_a_file_is_only_replaced_with_overwrite(embed, model, tmp_path, capsys):
    out = tmp_path / "a.npz"
    np.savez(out, prompt_embeds=np.zeros(3))
    before = digests(tmp_path)
    line = fails(capsys, "embed", "a cat", "--model", model, "--out", out)
    assert line == f"{out} exists already. Choose another name, or pass --overwrite.\n"
    assert digests(tmp_path) == before
    embed("a cat", "--out", out, "--overwrite")
    with np.load(out) as file:
        assert file["prompt_embeds"].shape == (2, 77, 32)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_what_is_no_file_of_embeddings_is_never_replaced(model, tmp_path, capsys, name):
    out = tmp_path / name
    out.write_text("precious")
    (tmp_path / "weights").mkdir()
    save_file({"weight": np.zeros(3)}, tmp_path / "weights" / "a.safetensors")
    np.savez(tmp_path / "weights" / "a.npz", weight=np.zeros(3))
    before = digests(tmp_path)
    for path in (out, tmp_path / "weights" / name):
        line = fails(capsys, "embed", "a cat", "--model", model, "--out", path, "--overwrite")
        assert line == f"{path} is no file of embeddings, so it is not overwritten. Choose another name.\n"
    assert digests(tmp_path) == before


def test_what_a_link_leads_to_is_replaced(embed, model, tmp_path, capsys):
    out, link = tmp_path / "a.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(out)
    assert "exists already" in fails(capsys, "embed", "a cat", "--model", model, "--out", link)
    save_file({"prompt_embeds": np.zeros(3)}, out)
    embed("a cat", "--out", link, "--overwrite")
    assert link.is_symlink()
    assert load_file(out)["prompt_embeds"].shape == (2, 77, 32)


@pytest.mark.slow
def test_the_file_is_there_though_the_reader_is_gone(tiny_sd15, tmp_path):
    with Path("/dev/full").open("w") as full:
        command = ["embed", "a cat", "--model", tiny_sd15, "--family", "sd15", "--out", tmp_path / "a.npz"]
        subprocess.run([str(SCRIPT), *map(str, command)], stdout=full, stderr=subprocess.PIPE, check=False)
    with np.load(tmp_path / "a.npz") as file:
        assert file["prompt_embeds"].shape == (2, 77, 32)


def test_a_failure_keeps_the_file_that_was_to_be_replaced(model, tmp_path, capsys):
    out = tmp_path / "a.npz"
    np.savez(out, prompt_embeds=np.zeros(3))
    before = digests(tmp_path)
    fails(capsys, "embed", LONG, "--model", model, "--out", out, "--overwrite")
    assert digests(tmp_path) == before


def test_truncation_warns_in_one_line_on_stderr_every_time(model, capsys):
    for _ in range(2):
        assert main(["embed", LONG, "--model", str(model), "--overflow", "truncate"]) == 0
        out, err = capsys.readouterr()
        assert re.fullmatch(r"clip-jax: warning: .*82 tokens, 5 too many; does not fit: 'cat cat cat cat cat'.*\n", err)
        assert out.startswith("prompt_embeds (2, 77, 32) float32\n")


def test_random_weights_warn_on_stderr(capsys, monkeypatch, encoder):
    monkeypatch.setitem(clip_jax.FAMILIES, "sd15", encoder.family)
    assert main(["embed", "a cat", "--model", "random:sd15"]) == 0
    assert re.fullmatch(r"clip-jax: warning: random:sd15 has random weights: .*\n", capsys.readouterr().err)


# --- tokenize


def test_tokenize_shows_ids_and_pieces(capsys):
    assert main(["tokenize", "a cat!"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "clip_l: 5 of 77 tokens, padded with '<|endoftext|>'",
        "     0   49406  <|startoftext|>",
        "     1     320  a</w>",
        "     2    2368  cat</w>",
        "     3     256  !</w>",
        "     4   49407  <|endoftext|>",
    ]


def test_tokenize_shows_what_does_not_fit(capsys):
    assert main(["tokenize", f"a dog and {LONG}"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("clip_l: 85 of 77 tokens, ")
    assert out.endswith("\n  does not fit: 'cat cat cat cat cat cat cat cat'\n")
    assert err == ""


def test_tokenize_with_the_tokenizer_of_a_model(capsys, tiny_sd21, tmp_path):
    (tmp_path / "prompts").write_text("a!\nb\n")
    arguments = ["tokenize", "--file", tmp_path / "prompts", "--model", tiny_sd21, "--family", "sd21"]
    assert main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "clip_h: 4 of 77 tokens, padded with '!'"
    assert lines[3] == "     2       0  !"
    assert lines[5] == "clip_h: 3 of 77 tokens, padded with '!'"


# --- info and convert


def test_info_of_a_family(capsys):
    assert main(["info", "random:sd21"]) == 0
    title, *towers, source, form = capsys.readouterr().out.splitlines()
    assert title == "sd21: Stable Diffusion 2.x"
    assert towers[0].startswith("  clip_h: ")
    assert any("340,387,840 parameters, float32, 1,361,551,360 bytes" in line for line in towers)
    assert any("gelu" in line for line in towers)
    assert source == "  source: random:sd21"
    assert form == "  format: seeded random weights"


def test_what_is_left_out_is_not_looked_for(capsys):
    assert main(["info", "random:sd3", "--without", "t5"]) == 0
    assert "clip_g: " in (shown := capsys.readouterr().out)
    assert "t5: " not in shown
    assert main(["tokenize", "a cat", "--model", "random:sd3", "--without", "t5"]) == 0
    assert "t5: " not in capsys.readouterr().out


def test_convert_writes_what_the_api_writes_and_shows_it(tiny_sd15, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(tiny_sd15), str(out), "--family", "sd15"]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    assert clip_jax.info(out) == clip_jax.info(model)
    assert "1,609,216 parameters, float32, 6,436,864 bytes" in shown
    for line in ("sd15: Stable Diffusion 1.x", "  source: sd15", "      files: model.safetensors"):
        assert line in shown.splitlines()
    assert "      ignored: none" in shown.splitlines()
    assert main(["info", str(out)]) == 0
    assert capsys.readouterr().out == shown


def test_convert_options(tiny_sd15, tmp_path, capsys):
    command = ["convert", str(tiny_sd15), str(tmp_path / "out"), "--family", "sd15", "--dtype", "bfloat16"]
    assert main(command) == 0
    assert "1,609,216 parameters, bfloat16, 3,218,432 bytes" in capsys.readouterr().out
    assert fails(capsys, *command).endswith("replace it with overwrite=True (--overwrite).\n")
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.slow
def test_quantised_params_are_written_shown_and_used(tiny_sd15, tmp_path, capsys):
    command = ["convert", str(tiny_sd15), str(tmp_path / "out"), "--family", "sd15", "--quantize", "int8"]
    assert main(command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "sd15: Stable Diffusion 1.x, quantised to int8"
    assert shown[1].startswith("  clip_l: 1,609,216 parameters, float32, int8, 1,8")
    rows = []
    for model, *options in ([tmp_path / "out"], [tiny_sd15, "--family", "sd15", "--quantize", "int8"], [tiny_sd15]):
        assert main(["embed", "a cat", "--model", str(model), "--family", "sd15", *options]) == 0
        rows.append(capsys.readouterr().out.splitlines()[:-1])
    assert rows[0] == rows[1] != rows[2]


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "embed x --model {tmp}/nowhere",
            "'{tmp}/nowhere' does not exist. Expected a folder, a file of weights, a Hub repo id",
        ),
        ("embed x --model ~nobody-of-that-name/x", "'~nobody-of-that-name/x' does not exist. Expected"),
        ("embed x --model random:sd99", "Unknown family 'sd99'; expected one of sd15, sd21"),
        ("embed x --model {model} --family sd21", "{model} is of family 'sd15'; family='sd21' was asked for."),
        ("embed x --model {model} --family sd99", "Unknown family 'sd99'; expected one of sd15, sd21"),
        ("embed x --model {model} --dtype int8", "dtype must be one of float32, bfloat16, float16, found"),
        ("embed x --model {model} --clip-skip 4", "clip_skip must be an int from 0 to 3 for clip_l, found 4."),
        ("embed x --model {model} --clip-skip -1", "clip_skip must be an int from 0 to 3 for clip_l, found -1."),
        ("embed --file {long} --model {model}", "Prompts of more than 77 tokens (BOS and EOS included): "),
        ("embed --file {tmp}/nowhere --model {model}", "[Errno 2] No such file or directory: '{tmp}/nowhere'"),
        ("embed --file {tmp} --model {model}", "[Errno 21] Is a directory: '{tmp}'"),
        ("embed --file {latin} --model {model}", "The prompts are not UTF-8 text: 'utf-8' codec can't decode"),
        ("embed --file {empty} --model {model}", "Expected prompts, one per line; found nothing."),
        ("tokenize --file {empty}", "Expected prompts, one per line; found nothing."),
        ("tokenize --file {latin}", "The prompts are not UTF-8 text: 'utf-8' codec can't decode byte 0xe9"),
        ("tokenize x --max-sequence-length 9", "sd15 takes no max_sequence_length: it has no T5. Leave it out."),
        (
            "tokenize x --model random:flux --max-sequence-length 513",
            "max_sequence_length must be an int from 1 to 512, found 513.",
        ),
        ("tokenize x --model {tmp}", "{tmp} has neither model_index.json nor text_encoder/ nor config.json; "),
        ("info {tmp}/nowhere", "'{tmp}/nowhere' does not exist."),
        ("info {long}", "{long}: expected a file of weights (safetensors, "),
        ("convert {tmp}/nowhere {tmp}/out", "'{tmp}/nowhere' does not exist."),
        ("convert {model} {tmp}/out", "{model} is an Orbax folder; expected a checkpoint in a foreign layout."),
        ("convert {source} {nothing}", "The folder to make has no name; expected a path."),
        ("convert {source} {tmp} --overwrite", "{tmp} is not a checkpoint written by clip_jax"),
        ("convert {source} {long}/out --family sd15", "{long}/out cannot be written: [Errno 17] File exists: '{long}'"),
        ("convert {source} {tmp}/out --family sd15 --dtype int4", "dtype must be one of float32, bfloat16, "),
        ("convert {source} {tmp}/out --quantize int2", "quantize must be None, 'int8', 'fp8', 'int4', found 'int2'."),
        (
            "convert {source} {tmp}/out --quantize int8 --verify",
            "verify does not go with quantize: it takes for an error what float32 does not explain, and int8",
        ),
        ("embed x --model {model} --quantize fp4", "quantize must be None, 'int8', 'fp8', 'int4', found 'fp4'."),
        ("embed x --model {model} --out {tmp}/a.csv", "--out must end in .safetensors or .npz, found 'a.csv'."),
        ("embed x --model {model} --out {tmp}/npz", "--out must end in .safetensors or .npz, found 'npz'."),
        ("embed x --model {model} --out {tmp}/no/a.npz", "{tmp}/no is not a folder; expected one to write a.npz"),
        ("embed x --model {model} --out {long} --overwrite", "--out must end in .safetensors or .npz, found"),
        ("embed x", "the following arguments are required: --model (see clip-jax embed --help)"),
        ("embed --model {model}", "one of the arguments PROMPT --file is required (see clip-jax embed --help)"),
        ("embed x --file {long} --model {model}", "argument --file: not allowed with argument PROMPT (see "),
        ("embed x y --model {model}", "unrecognized arguments: y (see clip-jax --help)"),
        ("embed x --model {model} --overflow cut", "argument --overflow: invalid choice: 'cut'"),
        ("embed x --model {model} --clip-skip two", "argument --clip-skip: invalid int value: 'two'"),
        ("tokenize", "one of the arguments PROMPT --file is required (see clip-jax tokenize --help)"),
        ("convert {source}", "the following arguments are required: OUT (see clip-jax convert --help)"),
        ("", "the following arguments are required: COMMAND (see clip-jax --help)"),
        ("train", "argument COMMAND: invalid choice: 'train'"),
        ("--frob", "the following arguments are required: COMMAND (see clip-jax --help)"),
    ],
)
def test_a_mistake_is_one_line(tiny_sd15, model, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "long").write_text(f"a\n{LONG}\n")
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    names = {name: tmp_path / name for name in ("empty", "long", "latin")}
    names |= {"tmp": tmp_path, "model": model, "source": tiny_sd15, "nothing": ""}
    before = digests(tmp_path)
    line = fails(capsys, *(argument.format(**names) for argument in arguments.split()))
    assert line.startswith(message.format(**names))
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expected prompts, one per line; found nothing.\n"),
        (b"caf\xe9\n", "The prompts are not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 3"),
    ],
)
def test_a_mistake_on_stdin_is_one_line(model, capsys, monkeypatch, content, message):
    type_in(monkeypatch, content)
    assert fails(capsys, "embed", "-", "--model", model).startswith(message)


def test_a_stdin_that_is_closed_is_one_line(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert fails(capsys, "embed", "-", "--model", model) == "Expected prompts on stdin, which is closed.\n"


def test_float16_that_overflows_is_one_line(tmp_path, capsys):
    state = hf_state(TINY)
    state["text_model.final_layer_norm.bias"][0] = 1e6
    source = write_text_encoder(tmp_path / "source", TINY.to_hf(), state)
    options = ("--family", "sd15", "--dtype", "float16")
    message = "text_model.final_layer_norm.bias holds values up to 1e+06, float16 ends at 65504."
    assert fails(capsys, "embed", "x", "--model", source, *options).startswith(message)
    assert fails(capsys, "convert", source, tmp_path / "out", *options).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_ctrl_c_ends_without_a_traceback(model, capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", type("", (), {"read": staticmethod(interrupt)}))
    assert main(["embed", "-", "--model", str(model)]) == 130
    assert capsys.readouterr() == ("", "")


def test_an_error_of_the_library_itself_is_not_hidden(model, monkeypatch):
    monkeypatch.setattr("clip_jax.loading.load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["embed", "x", "--model", str(model)])


# --- the installed command


def run(*arguments, **options):
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)


def test_version():
    done = run("--version", text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"clip-jax-text {clip_jax.__version__}\n", "")


@pytest.mark.parametrize("command", ["convert", "embed", "tokenize", "info", None])
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([*([command] if command else []), "--help"])
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: clip-jax {command or '[-h]'}")
    assert err == ""


def test_the_command_embeds(tiny_sd15, encoder, tmp_path):
    done = run(
        *("embed", "-", "--model", tiny_sd15, "--family", "sd15", "--out", tmp_path / "a.npz"),
        input="a cat\n한국어\n".encode(),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["prompt_embeds"], encoder(["a cat", "한국어"]).prompt_embeds)


def test_the_command_fails_in_one_line(tmp_path):
    done = run("embed", "x", "--model", tmp_path / "nowhere", text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"clip-jax: error: '.*nowhere' does not exist\. .*\n", done.stderr)


@pytest.mark.parametrize("platform", ["nowhere", "rocm"])
def test_devices_that_are_not_here_are_one_line(model, platform):
    done = run("embed", "x", "--model", model, text=True, env={**os.environ, "JAX_PLATFORMS": platform})
    assert (done.returncode, done.stdout) == (2, "")
    told = rf"clip-jax: error: JAX cannot start: .*JAX_PLATFORMS='{platform}' asks for it: unset it, .*\n"
    assert re.fullmatch(told, done.stderr)


def test_what_the_terminal_cannot_show_is_escaped():
    done = run("tokenize", "Ō", env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert b"\\u" in done.stdout


def test_a_reader_that_is_gone_is_no_mistake():
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with os.fdopen(write) as gone:
        done = subprocess.run(
            [str(SCRIPT), "tokenize", "a cat"], stdout=gone, stderr=subprocess.PIPE, check=False, env=environment
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_bytes_that_are_no_text_are_one_line():
    done = run("tokenize", "-", input=b"caf\xe9\n", env={"LC_ALL": "C"})
    assert done.returncode == 2
    assert re.fullmatch(rb"clip-jax: error: prompt\[0\] holds a lone surrogate, .*\n", done.stderr)


def test_a_copy_of_a_converted_model_without_a_file_is_one_line(model, tmp_path, capsys):
    copy = shutil.copytree(model, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizers")
    assert fails(capsys, "info", copy).startswith(f"{copy} is not whole. damaged (2): tokenizers/clip_l/")


def test_a_home_that_cannot_be_written_keeps_nobody_from_encoding(tiny_sd15, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)  # an earlier test may have set one
    assert main(["embed", "a cat", "--model", str(tiny_sd15), "--family", "sd15"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("prompt_embeds (2, 77, 32)")
    assert "warning: " in err
    assert "cannot be made" in err
