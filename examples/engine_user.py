"""Several fine-tuned models on one decoder, streamed side by side by the loop that a server would run.

    python examples/engine_user.py BASE poet=PATH clerk=PATH

BASE is a checkpoint folder, a GGUF file or a hub id; each PATH is a full fine-tune of it or a PEFT LoRA
adapter.
"""

from __future__ import annotations

import sys

from qsun import DecodeEngine, SamplingParams

QUESTION = "What do you think of the sea?"


def main(base: str, tasks: dict[str, str]) -> None:
    engine = DecodeEngine.from_pretrained(base, bits=4)
    engine.add_model("base")
    for name, path in tasks.items():
        engine.add_model(name, path)
    print(engine.explain(), "\n")

    chat = [{"role": "user", "content": QUESTION}]
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=32)
    texts = {}
    for name in engine.models:
        request_id = engine.submit(chat, model=name, params=params)
        texts[request_id] = ""

    # One step gives every running request its next token, whatever model it is of.
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.text
            if output.finish_reason is not None:
                told = output.error if output.finish_reason == "error" else texts[output.request_id]
                print(f"[{output.model}] ({output.finish_reason}) {told}\n")

    stats = engine.stats()
    print(f"{stats.output_tokens} tokens in {stats.decode_steps} decode steps, {stats.mean_batch:.1f} a step")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], dict(argument.split("=", 1) for argument in sys.argv[2:]))
