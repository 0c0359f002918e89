"""Talk to the model of a run, through plain transformers: `uv run python examples/chat.py runs/NAME`.

One conversation; an empty line ends it. Takes a run's folder, a model's, or the Hub's OWNER/NAME.
"""

import sys
from contextlib import suppress
from pathlib import Path

from transformers import TextStreamer, logging, pipeline


def chat(name: str):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    of_run = Path(name) / "hf"
    # Without False transformers would ask, and a yes on the terminal would run the model's code; without sdpa it would
    # run a kernel that the model's config names as its attention.
    options = {"trust_remote_code": False, "model_kwargs": {"attn_implementation": "sdpa"}}
    try:
        model = pipeline("text-generation", str(of_run if of_run.is_dir() else name), **options)
    except (OSError, ValueError) as error:
        sys.exit(f"no model there: give a run's folder, a model's, or the Hub's OWNER/NAME, not {name}: {error}")
    if not model.tokenizer.chat_template:
        sys.exit(f"{name} has no chat template: it was trained on text only, so go on with lacuna sft")
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = []
    with suppress(EOFError):
        while line := input("you: ").strip():
            print("model: ", end="", flush=True)
            messages.append({"role": "user", "content": line})
            messages = model(messages, streamer=streamer, max_new_tokens=512)[0]["generated_text"]


if __name__ == "__main__":
    chat(*sys.argv[1:])
