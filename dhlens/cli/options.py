"""What the commands share: options of the model, the needle task and the run, and reading them."""

import json
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Model = Annotated[str, typer.Option(help="Name, Hub id, folder or .gguf file.")]
Haystack = Annotated[str | None, typer.Option(help="Text file, folder or hub:owner/name; default: Python's own docs.")]
Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")]
Depths = Annotated[str, typer.Option(help="Where the needle goes, 0 to 1, comma-separated.")]
Task = Annotated[
    str, typer.Option(help="niah (needles), hotpot (questions over documents) or evidence (contracts, meetings, code).")
]
Kind = Annotated[str | None, typer.Option(help="Of evidence: contracts, meetings or code.")]
Niah = Annotated[Path | None, typer.Option(help="Finished needle scan of the model, to set reasoning heads beside.")]
Count = Annotated[int | None, typer.Option("--n", help="Haystack windows, the independent groups; or questions.")]
Windows = Annotated[int, typer.Option("--n", help="Haystack windows: the independent groups.")]
Needle = Annotated[str, typer.Option(help="uuid, number or words; or a sentence with {answer}.")]
Question = Annotated[str | None, typer.Option(help="With an own needle sentence.")]
Answer = Annotated[str | None, typer.Option(help="With an own needle sentence.")]
PerCell = Annotated[int, typer.Option(help="Needles per window, length and depth.")]
Template = Annotated[str, typer.Option(help="chat, plain, or an own text with {context} and {question}.")]
TemplateKwargs = Annotated[
    str | None, typer.Option(help="Options of the chat template, as JSON: '{\"enable_thinking\": false}'.")
]
Questions = Annotated[
    str | None,
    typer.Option(help="File or folder of HotpotQA, 2WikiMultihopQA or MuSiQue, or hotpotqa/hotpot_qa; default: ours."),
]
Asked = Annotated[int, typer.Option("--n", help="Questions; fewer where some share a gold document with a fitted one.")]
Fit = Annotated[str, typer.Option(help="How many other questions the heads are chosen on, or a finished scan of such.")]
Heads = Annotated[int, typer.Option("--k", help="Heads of each policy.")]
Broken = Annotated[str, typer.Option(help="Broken records: raise (stop) or skip (leave out).")]
Length = Annotated[int | None, typer.Option(help="Most tokens of a prompt; distractors are left out to fit.")]
Repeat = Annotated[bool, typer.Option(help="Repeat a haystack that is too short.")]
Seed = Annotated[int, typer.Option(help="Of every draw.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most answer tokens.")]
Room = Annotated[int | None, typer.Option("--max-new-tokens", help="Most answer tokens: 48 of needles, 32 of others.")]
Out = Annotated[Path, typer.Option(help="Folder of the run; resumed if it was cut off.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, or auto for all; default: the best there is.")]
Quantize = Annotated[str | None, typer.Option(help="8bit or 4bit: weights in fewer bits.")]
AsJson = Annotated[bool, typer.Option("--json", help="One machine-readable line.")]
Player = Annotated[
    bool, typer.Option("--player", help="Write a page to step through one episode: into the run, or to the file named.")
]
Episode = Annotated[str, typer.Option(help="Number or id of the episode to play.")]
Quiet = Annotated[bool, typer.Option(help="No progress bar.")]


TASKS = ("niah", "hotpot", "evidence")
_OF_NEEDLES = ("haystack", "lengths", "depths", "needle", "question", "answer", "needles_per_cell", "repeat")
_OF_QUESTIONS = ("questions", "kind", "length", "niah", "query")


def check_task(command: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse options of another task than the one that `command` was given.

    Raises:
        ValueError: no such task, or an option that it does not take.
    """
    task, known = given["task"], signature(command).parameters
    one_of("task", task, dict.fromkeys(TASKS))
    others = (*_OF_QUESTIONS,) if task == "niah" else _OF_NEEDLES if task == "evidence" else (*_OF_NEEDLES, "kind")
    for name in others:
        if name in known and given[name] != known[name].default:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --task {task}")


def question_episodes(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The loaded model and the questions over documents that a command's options ask for, as `needle_episodes`."""
    from dhlens.model import load
    from dhlens.tasks import evidence, hotpot
    from dhlens.tasks.multihop import read_questions

    dtype = one_of("dtype", given["dtype"], DTYPES)
    options = json_object("template-kwargs", given["template_kwargs"])
    same = {name: given[name] for name in ("length", "seed", "template", "n")}
    source: Any = given["questions"]
    if given["task"] == "evidence":
        if source is None or given["kind"] is None:
            raise ValueError("--task evidence needs --questions FILE and --kind contracts, meetings or code")
        source = evidence.read_located(source, kind=given["kind"])
        same["kind"] = given["kind"]
    elif source is not None:
        source = read_questions(source)
    model = load(given["model"], dtype=dtype, device=given["device"], quantize=given.get("quantize"))
    task: Any = evidence if given["task"] == "evidence" else hotpot
    return model, task.episodes(
        model.tokenizer, source, max_positions=model.max_positions, template_kwargs=options, **same
    )


def needle_trace(folder: Path | None) -> Any:
    """The trace of a finished needle scan; None where none is given.

    Raises:
        ValueError: the folder holds another kind of run, or an unfinished one.
    """
    if folder is None:
        return None
    from dhlens.recipes import Scan
    from dhlens.store import Run

    kind = Run.read(folder).card.settings.get("recipe", "scan")
    if kind != "scan":
        raise ValueError(f"--niah takes a needle scan (dhlens scan --out RUN), and {folder} holds: {kind}")
    return Scan.load(folder).trace


def needle_episodes(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The loaded model and the needle episodes that a command's options ask for; what is wrong with them is said first.

    `given` holds the command's arguments by name, the options above among them.
    """
    from dhlens.model import load
    from dhlens.tasks import niah
    from dhlens.tasks.haystack import read_haystack

    chosen = _needle(given["needle"], given["question"], given["answer"])
    lengths, depths = numbers("lengths", given["lengths"], int), numbers("depths", given["depths"], float)
    dtype = one_of("dtype", given["dtype"], DTYPES)
    options = json_object("template-kwargs", given["template_kwargs"])
    prose = read_haystack(given["haystack"])  # before the model, which takes longer
    model = load(given["model"], dtype=dtype, device=given["device"], quantize=given.get("quantize"))
    same = {name: given[name] for name in ("n", "seed", "template", "needles_per_cell", "repeat")}
    episodes = niah.episodes(
        model.tokenizer,
        prose,
        lengths=lengths,
        depths=depths,
        needle=chosen,
        max_positions=model.max_positions,
        template_kwargs=options,
        **same,
    )
    return model, episodes


def one_of(option: str, value: str, known: dict[str, Any]) -> Any:
    """The value that an option's word stands for.

    Raises:
        ValueError: it stands for none.
    """
    if value not in known:
        raise ValueError(f"--{option} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """The JSON object that an option gives; None where it is not given.

    Raises:
        ValueError: it is none.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--{option} takes a JSON object such as '{{\"enable_thinking\": false}}', got {text!r}")
    return found


def words(text: str) -> tuple[str, ...]:
    """Words parted by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def some_of(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Words parted by commas, each of them known.

    Raises:
        ValueError: one is not, or there is none.
    """
    found = words(text)
    for word in found or ("",):
        one_of(option, word, dict.fromkeys(known))
    return found


def numbers(option: str, text: str, kind: type) -> tuple[Any, ...]:
    """Numbers parted by commas.

    Raises:
        ValueError: one is none.
    """
    try:
        return tuple(kind(part) for part in words(text))
    except ValueError:
        raise ValueError(f"--{option} takes {kind.__name__} numbers parted by commas, got {text!r}") from None


def _needle(needle: str, question: str | None, answer: str | None) -> Any:
    from dhlens.tasks.needles import NEEDLES, Needle

    if needle in NEEDLES:
        if question or answer:
            raise ValueError(f"--question and --answer go with an own needle sentence, not with {needle!r}")
        return needle
    if not question or not answer:
        raise ValueError(
            f"--needle is {', '.join(NEEDLES)}, or a sentence with --question and --answer; got {needle!r}"
        )
    return Needle(sentence=needle, question=question, answer=answer)
