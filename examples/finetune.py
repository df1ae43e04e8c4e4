"""Tune a model on a text of your own, then compare what it writes before and after.

python examples/finetune.py out.safetensors examples/primers.txt tuned.safetensors

examples/primers.txt holds two classical primers, 千字文 and 三字经, in couplets of four and of
three characters; the shipped model, which knows verse of five and seven, learns the new metre.
"""

from __future__ import annotations

import argparse

from gpt2ml_torch import Generator
from gpt2ml_torch.finetuning import FinetuneConfig, finetune


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune a model on a text file.")
    parser.add_argument("model", help="a .safetensors file made by the converter")
    parser.add_argument("text", help="a UTF-8 text file, articles separated by blank lines")
    parser.add_argument("out", help="the tuned model's file")
    parser.add_argument("--prompt", default="天地玄黄，")
    parser.add_argument("--epochs", type=float, default=8)
    arguments = parser.parse_args()

    finetune(
        FinetuneConfig(
            model=arguments.model,
            data=(arguments.text,),
            out=arguments.out,
            epochs=arguments.epochs,
            learning_rate=1e-3,  # for 2 million parameters; use the default for the published size
            precision="float32",
        )
    )
    for path in (arguments.model, arguments.out):
        generator = Generator.from_pretrained(path)
        text = generator.generate(arguments.prompt, do_sample=False, max_new_tokens=40)[0]
        print(f"{path}: {text}")


if __name__ == "__main__":
    main()
