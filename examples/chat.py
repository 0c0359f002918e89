"""Talk to the model of a run, through plain transformers: `uv run python examples/chat.py runs/NAME`.

One conversation; an empty line, Ctrl-D or Ctrl-C ends it. Takes a run's folder, a model's, or the Hub's OWNER/NAME.
Answers are greedy: to the same words always the same. The model of a run of `lacuna pt` goes on with a text instead.
"""

import sys
import tomllib
from contextlib import suppress
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, logging, pipeline

from lacuna.checkpoint import in_order


def chat(name: str):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (Path(name) / "state.json").exists():
        sys.exit(f"{name} is a checkpoint: make a model's folder of it by lacuna export {name} FOLDER")
    of_run = Path(name) / "hf"
    saved = in_order(Path(name) / "checkpoints")
    if saved and not of_run.is_dir():
        sys.exit(f"{name} is not over, so there is no {of_run}: lacuna export {saved[-1]} FOLDER makes a model of it")
    folder = str(of_run if of_run.is_dir() else name)
    config = Path(name) / "config.toml"
    is_text = config.exists() and tomllib.loads(config.read_text()).get("task") == "pt"
    # Without False transformers would ask, and a yes on the terminal would run the model's code; without sdpa it would
    # run a kernel that the model's config names as its attention.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        sys.exit(f"no model there: give a run's folder, a model's, or the Hub's OWNER/NAME, not {name}: {reason}")
    if not (is_text or tokenizer.chat_template):
        sys.exit(f"{name} has no chat template: it was trained on text only, so go on with lacuna sft")
    answer = pipeline("text-generation", model, tokenizer=tokenizer)
    how = {"streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), "max_new_tokens": 512}
    if is_text:
        print("It was trained on text, not to chat: begin one, and it goes on.")
        while text := input("text: ").strip():
            answer(text, do_sample=False, max_new_tokens=64, streamer=how["streamer"])
        return
    messages = []
    while line := input("you: ").strip():
        print("model: ", end="", flush=True)
        messages.append({"role": "user", "content": line})
        messages = answer(messages, do_sample=False, **how)[0]["generated_text"]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: chat.py runs/NAME, or a model's folder, or the Hub's OWNER/NAME")
    with suppress(EOFError, KeyboardInterrupt):
        chat(sys.argv[1])
