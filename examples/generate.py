"""Continue a prompt: the most probable text, one sampled text as a stream, and three at once.

python examples/generate.py out.safetensors 春眠不觉晓
"""

from __future__ import annotations

import argparse

from gpt2ml_torch import GenerationConfig, Generator


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a prompt in three ways.")
    parser.add_argument("model", help="a .safetensors file made by the converter")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()

    generator = Generator.from_pretrained(arguments.model)

    print("The most probable text:")
    config = GenerationConfig(do_sample=False, max_new_tokens=arguments.max_new_tokens)
    print(generator.generate(arguments.prompt, config)[0])

    print("One sampled text, as it is written:")
    config = GenerationConfig(top_p=0.9, seed=1, max_new_tokens=arguments.max_new_tokens)
    for piece in generator.stream(arguments.prompt, config):
        print(piece, end="", flush=True)
    print()

    print("Three sampled texts, each up to its first full stop:")
    texts = generator.generate(
        arguments.prompt,
        num_return_sequences=3,
        top_k=5,
        stop=["。"],
        seed=2,
        max_new_tokens=arguments.max_new_tokens,
    )
    print("\n".join(texts))


if __name__ == "__main__":
    main()
