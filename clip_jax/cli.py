"""`clip-jax convert | export | embed | tokenize | info`: the API from a shell, and nothing that it lacks."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from clip_jax._version import __version__
from clip_jax.errors import ClipJaxError

if TYPE_CHECKING:
    from clip_jax.structs import TextEmbeddings

_OUT_FORMATS = (".safetensors", ".npz")
_FOREIGN_HELP = "diffusers folder, text encoder folder, file of weights (or several), or Hub repo id"
_SOURCE_HELP = f"converted folder, {_FOREIGN_HELP}, or random:FAMILY"
_MODEL_HELP = _SOURCE_HELP.replace("(or several)", "(repeat --model for several)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 with one line on stderr for a user error."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # prompts and pieces may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_orbax_threads
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_: _say("warning", message)
        try:
            arguments.run(arguments)
            if sys.stdout is not None:  # a reader that is gone is to be noticed here, not while Python ends
                sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ClipJaxError, OSError) as error:
            _say("error", error)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


def _without_orbax_threads(unraisable: Any) -> None:
    """Drops what Orbax' threads say after a failed write, across our one line; that error has been reported."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _say(kind: str, message: object) -> None:
    print(f"clip-jax: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"clip-jax: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="clip-jax", description="Text encoders for JAX diffusion pipelines.")
    parser.add_argument("--version", action="version", version=f"clip-jax-text {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    convert = _command(commands, "convert", _convert, "convert a checkpoint to an Orbax folder")
    convert.add_argument("source", metavar="SRC", nargs="+", help=_FOREIGN_HELP)
    convert.add_argument("out", metavar="OUT", help="folder to make")
    convert.add_argument("--dtype", help="of the params; by default the source's, or bfloat16 where it is quantised")
    convert.add_argument("--quantize", metavar="SCHEME", help="store the params quantised: int8, fp8 or int4")
    convert.add_argument("--verify", action="store_true", help="compare what source and result compute on prompts")
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at OUT")
    _add_source_options(convert)
    _add_tokenizer_option(convert)

    export = _command(commands, "export", _export, "write a converted folder as safetensors that others read")
    export.add_argument("source", metavar="MODEL", help="folder written by `clip-jax convert`")
    export.add_argument("out", metavar="OUT", help="folder to make")
    export.add_argument("--format", choices=("hf",), default="hf", help="diffusers folder, transformers' names")
    export.add_argument("--overwrite", action="store_true", help="replace an export that is at OUT")

    embed = _command(commands, "embed", _embed, "encode prompts, twice: the second time to tell how long it takes")
    _add_prompt(embed)
    embed.add_argument("--prompt-2", metavar="TEXT", help="for the second text encoder (default: the prompt)")
    embed.add_argument("--prompt-3", metavar="TEXT", help="for the third text encoder (default: the prompt)")
    embed.add_argument("--negative", metavar="TEXT", help="negative prompt, for all prompts (flux: with --guidance)")
    embed.add_argument("--negative-2", metavar="TEXT", help="for the second text encoder (default: --negative)")
    embed.add_argument("--negative-3", metavar="TEXT", help="for the third text encoder (default: --negative)")
    embed.add_argument("--model", metavar="SRC", required=True, action="append", help=_MODEL_HELP)
    embed.add_argument("--dtype", default="float32", help="of the computation: float32 (default), bfloat16, float16")
    embed.add_argument("--quantize", metavar="SCHEME", help="quantise the params while reading them: int8, fp8 or int4")
    embed.add_argument(
        "--guidance",
        action=argparse.BooleanOptionalAction,
        help="with or without unconditional rows (default: as the family's pipelines want it)",
    )
    embed.add_argument("--clip-skip", type=int, metavar="N", help="layers to leave out at the end")
    embed.add_argument("--clip-skip-negative", type=int, metavar="N", help="the same for the negative prompts")
    embed.add_argument("--max-sequence-length", type=int, metavar="L", help="tokens of T5, at most 512")
    embed.add_argument("--overflow", choices=("error", "truncate"), default="error", help="for prompts too long")
    embed.add_argument("--out", metavar="FILE", type=Path, help="write the embeddings to .safetensors or .npz")
    embed.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    _add_source_options(embed)
    _add_tokenizer_option(embed)

    tokenize = _command(commands, "tokenize", _tokenize, "show the tokens of prompts, and what would be cut")
    _add_prompt(tokenize)
    tokenize.add_argument("--max-sequence-length", type=int, metavar="L", help="tokens of T5, at most 512")
    tokenize.add_argument("--model", metavar="SRC", action="append", help=f"{_MODEL_HELP} (default: random:sd15)")
    _add_source_options(tokenize)
    _add_tokenizer_option(tokenize)

    info = _command(commands, "info", _info, "show what a model holds, without reading its weights")
    info.add_argument("model", metavar="MODEL", nargs="+", help=_SOURCE_HELP)
    _add_source_options(info)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_prompt(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group(required=True)
    group.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; - reads one per line from stdin")
    group.add_argument("--file", metavar="FILE", type=Path, help="read prompts from a file, one per line")


def _add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--family", help="where it cannot be told from the source: sd15, sd21, ...")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repo")
    command.add_argument("--local-files-only", action="store_true", help="take a Hub repo from the local cache")
    command.add_argument("--without", metavar="TOWER", action="append", default=[], help="leave out a tower: t5 of sd3")
    text = "config.json of a tower, where a file of weights does not tell"
    command.add_argument("--config", metavar="TOWER=FILE", action="append", default=[], help=text)
    command.add_argument(
        "--text-projection",
        choices=("auto", "as_is", "transpose"),
        default="auto",
        help="how text_projection is stored, where its name says otherwise: as_is is [D, P]",
    )


def _add_tokenizer_option(command: argparse.ArgumentParser) -> None:
    text = "tokenizer to use instead of the source's"
    command.add_argument("--tokenizer", metavar="TOWER=FOLDER", action="append", default=[], help=text)


def _by_tower(option: str, given: Sequence[str]) -> dict[str, str]:
    pairs = dict(pair.split("=", 1) for pair in given if "=" in pair)
    if len(pairs) < len(given):
        raise ClipJaxError(f"{option} expects TOWER=PATH, each tower once; found {' '.join(given)}.")
    return pairs


def _reading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `load` and `convert` that say how to read a source."""
    names = ("family", "revision", "local_files_only", "without", "text_projection")
    options = {name: getattr(arguments, name) for name in names}
    options["config"] = _by_tower("--config", arguments.config)
    if "tokenizer" in arguments:
        options["tokenizer"] = _by_tower("--tokenizer", arguments.tokenizer)
    return options


def _one_or_all(sources: Sequence[str]) -> str | Sequence[str]:
    return sources[0] if len(sources) == 1 else sources


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt not in (None, "-"):
        return [arguments.prompt]
    if arguments.file is None and sys.stdin is None:
        raise ClipJaxError("Expected prompts on stdin, which is closed.")
    try:
        text = sys.stdin.read() if arguments.file is None else arguments.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ClipJaxError(f"The prompts are not UTF-8 text: {error}.") from error
    if not text:
        raise ClipJaxError("Expected prompts, one per line; found nothing.")
    # A byte order mark is no part of a prompt, and only a newline ends one: not U+2028, as in `splitlines`.
    return text.removeprefix("\ufeff").removesuffix("\n").split("\n")


def _convert(arguments: argparse.Namespace) -> None:
    from clip_jax.convert import convert

    out = convert(
        _one_or_all(arguments.source),
        arguments.out,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        verify=arguments.verify,
        overwrite=arguments.overwrite,
        **_reading_options(arguments),
    )
    _print_info(str(out))


def _export(arguments: argparse.Namespace) -> None:
    from clip_jax.convert import export

    print(f"wrote {export(arguments.source, arguments.out, format=arguments.format, overwrite=arguments.overwrite)}")


def _embed(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        _check_out(arguments.out, arguments.overwrite)
    prompts = _prompts(arguments)
    _check_devices()
    from clip_jax.compilation import enable_compilation_cache
    from clip_jax.loading import load

    try:
        enable_compilation_cache()
    except ClipJaxError as error:  # a read-only home is no reason not to encode
        _say("warning", f"{error} Programs are compiled anew each time.")
    encoder = load(
        _one_or_all(arguments.model),
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        cache_bytes=0,  # each prompt is wanted once: nothing to be remembered, and one program instead of two
        **_reading_options(arguments),
    )
    start = time.perf_counter()
    tokens = encoder.tokenize(
        prompts,
        arguments.negative,
        prompt_2=arguments.prompt_2,
        prompt_3=arguments.prompt_3,
        negative_prompt_2=arguments.negative_2,
        negative_prompt_3=arguments.negative_3,
        guidance=arguments.guidance,
        max_sequence_length=arguments.max_sequence_length,
        overflow=arguments.overflow,
    )
    seconds = [time.perf_counter() - start]
    for _ in range(2):  # the first call compiles and runs, the second only runs
        start = time.perf_counter()
        out = encoder.encode(tokens, clip_skip=arguments.clip_skip, clip_skip_negative=arguments.clip_skip_negative)
        out.prompt_embeds.block_until_ready()
        seconds.append(time.perf_counter() - start)
    tokenise, first, run = seconds

    if arguments.out is not None:  # before anything is printed, for a reader may be gone
        _write(arguments.out, out)
    _print_rows(out, prompts, "(zeros)" if tokens.zero_uncond else repr(arguments.negative or ""))
    print(f"tokenise {tokenise * 1e3:.1f} ms, compile {max(first - run, 0):.2f} s, run {run * 1e3:.1f} ms")
    if arguments.out is not None:
        print(f"wrote {arguments.out}")


def _check_devices() -> None:
    """Refuses to go on where JAX cannot start: what it would raise later says nothing of the reason."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms, reason = jax.config.jax_platforms, str(error).partition("\n")[0] or "there is no device"
        advice = f" JAX_PLATFORMS={platforms!r} asks for it: unset it, or install JAX for that." if platforms else ""
        raise ClipJaxError(f"JAX cannot start: {reason}.{advice}") from error


def _print_rows(out: TextEmbeddings, prompts: list[str], negative: str) -> None:
    import numpy as np

    labels = [("uncond", negative)] * len(prompts) if out.guidance else []
    labels += [("cond", repr(prompt)) for prompt in prompts]
    for name, array in _arrays(out).items():
        print(f"{name} {array.shape} {array.dtype}")
        if name != "text_ids":
            for row, (kind, text) in zip(array.astype(np.float32), labels, strict=True):
                # A norm alone is the same for all prompts where a LayerNorm without its trained scale comes last.
                end = " ".join(f"{value:8.4f}" for value in row[..., -3:].reshape(-1, 3)[-1])
                print(f"  {kind:6}  norm {np.linalg.norm(row):10.4f}  ends {end}  {text}")


def _arrays(out: TextEmbeddings) -> dict[str, Any]:
    import numpy as np

    names = ("prompt_embeds", "pooled_prompt_embeds", "text_ids")
    return {name: np.asarray(getattr(out, name)) for name in names if getattr(out, name) is not None}


def _check_out(path: Path, overwrite: bool) -> None:
    if path.suffix not in _OUT_FORMATS:
        raise ClipJaxError(f"--out must end in {' or '.join(_OUT_FORMATS)}, found {path.name!r}.")
    if os.path.lexists(path) and not overwrite:
        raise ClipJaxError(f"{path} exists already. Choose another name, or pass --overwrite.")
    if path.exists() and not _holds_embeddings(path):
        raise ClipJaxError(f"{path} is no file of embeddings, so it is not overwritten. Choose another name.")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ClipJaxError(f"{path.parent} is not a folder; expected one to write {path.name} into.")
    if not os.access(folder, os.W_OK):
        raise ClipJaxError(f"{path.parent} cannot be written to. Choose another place for {path.name}.")


def _holds_embeddings(path: Path) -> bool:
    """Whether a file is one of `_write`."""
    import numpy as np
    from safetensors import safe_open

    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return "prompt_embeds" in arrays.files
        with safe_open(path, "numpy") as tensors:
            return "prompt_embeds" in tensors.keys()  # noqa: SIM118
    except Exception:  # whatever files of other kinds raise
        return False


def _write(path: Path, out: TextEmbeddings) -> None:
    """Writes the embeddings beside `path` first: what is there already is only replaced by a whole file."""
    import numpy as np
    from safetensors.numpy import save

    arrays, path = _arrays(out), path.resolve()  # what a link leads to is replaced, not the link
    with tempfile.TemporaryDirectory(prefix=".clip-jax-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        if path.suffix == ".npz":
            # numpy's format has no bfloat16; float32 holds its values exactly.
            np.savez(new, **{k: v.astype(np.float32) if v.dtype.kind == "V" else v for k, v in arrays.items()})
        else:
            new.write_bytes(save(arrays))
        os.replace(new, path)


def _tokenize(arguments: argparse.Namespace) -> None:
    from clip_jax.loading import info, load_tokenizers
    from clip_jax.tokenize import check_max_sequence_length

    model, options = _one_or_all(arguments.model or ["random:sd15"]), _reading_options(arguments)
    tokenizers = load_tokenizers(model, **options)
    family = info(model, **{name: option for name, option in options.items() if name != "tokenizer"}).family
    check_max_sequence_length(family, arguments.max_sequence_length)
    for prompt in _prompts(arguments):
        for name, tokenizer in tokenizers.items():
            length = family.row_length(family.tower(name), tokenizer.model_max_length, arguments.max_sequence_length)
            report = tokenizer.inspect(prompt, length)
            count = f"{len(report.ids)} of {report.max_length} tokens"
            print(f"{name}: {count}, padded with {tokenizer.pad_token!r}")
            for index, (token, piece) in enumerate(zip(report.ids, report.pieces, strict=True)):
                print(f"  {index:4}  {token:6}  {piece}")
            if report.overflow_text:
                print(f"  does not fit: {report.overflow_text!r}")


def _info(arguments: argparse.Namespace) -> None:
    _print_info(_one_or_all(arguments.model), **_reading_options(arguments))


def _print_info(source: str | Sequence[str], **options: Any) -> None:
    from clip_jax.loading import info

    model = info(source, **options)
    quantized = f", quantised to {model.quantize}" if model.quantize else ""
    print(f"{model.family.name}: {model.family.title}{quantized}")
    for name, tower in model.towers.items():
        print(f"  {name}: {tower.parameters:,} parameters, {', '.join(tower.dtypes)}, {tower.nbytes:,} bytes")
        print(f"    {', '.join(f'{key} {value}' for key, value in vars(tower.config).items())}")
    _print_tree(model.provenance, "  ")


def _print_tree(tree: dict[str, Any], indent: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{key}: {', '.join(map(str, value)) or 'none'}")
        else:
            print(f"{indent}{key}: {value}")
