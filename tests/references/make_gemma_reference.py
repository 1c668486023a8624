"""Writes gemma3_270m.npz: what Hugging Face transformers computes for Gemma 3 270M, in PyTorch and float32.

Run once, in an environment with torch, accelerate, transformers 5 and gguf; the tests need no torch. The GGUF file is
the four parts that `scripts/prepare_demo.py --gemma` fetches, one after the other:

    python tests/references/make_gemma_reference.py --gguf=gemma-3-270m-q4_k_m.gguf --assets=assets

transformers reads the weights from the GGUF itself, and dialogues are written as text here, without a chat template;
only the tokens of a text are those of assets/gemma3-270m/tokenizer.json. The file has
    tokens [640], more than the model's window of 512: held-out dialogues, one after the other;
    positions and vocabulary: strided subsets; logits [positions, vocabulary] and logsumexp [positions] at them;
    dialogues [D]: lines of assets/chitchat/validation.jsonl, the first with at most 16 responses each;
    nll and response_tokens [about 30]: of every response of those, each from a pass of its own; nll in nats, summed.
"""

import argparse
import itertools
import json
import pathlib

import numpy as np
import tokenizers
import torch
import transformers

_FILE = pathlib.Path(__file__).parent / "gemma3_270m.npz"
_TOKENS, _RESPONSES = 640, 30
_ROLES = {"user": "user", "assistant": "model"}


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _write(messages: list[dict[str, str]]) -> str:
    turns = (f"<start_of_turn>{_ROLES[one['role']]}\n{one['content'].strip()}<end_of_turn>\n" for one in messages)
    return "<bos>" + "".join(turns)


@torch.no_grad()
def _measure(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    return -float(torch.log_softmax(logits, -1)[range(len(response)), response].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--assets", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.gguf.parent, gguf_file=arguments.gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    print(json.dumps(model.config.to_dict(), default=str))
    tokenizer = tokenizers.Tokenizer.from_file(str(arguments.assets / "gemma3-270m" / "tokenizer.json"))
    lines = (arguments.assets / "chitchat" / "validation.jsonl").read_text(encoding="utf-8").splitlines()

    dialogues, nll, counts = [], [], []
    for number, line in enumerate(lines):
        messages = json.loads(line)["messages"]
        if sum(message["role"] == "assistant" for message in messages) > 16 or len(nll) >= _RESPONSES:
            continue
        dialogues.append(number)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = _encode(tokenizer, _write(messages[:index]) + "<start_of_turn>model\n")
                response = _encode(tokenizer, message["content"].strip() + "<end_of_turn>")
                nll.append(_measure(model, prompt, response))
                counts.append(len(response))

    texts = (_encode(tokenizer, _write(json.loads(line)["messages"])) for line in lines)
    tokens = np.array(list(itertools.islice(itertools.chain.from_iterable(texts), _TOKENS)))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None]).logits[0]
    positions, vocabulary = np.arange(0, _TOKENS, 7), np.arange(0, logits.shape[1], 2621)
    logits = logits[positions]
    np.savez_compressed(
        _FILE,
        tokens=tokens.astype(np.int32),
        positions=positions.astype(np.int32),
        vocabulary=vocabulary.astype(np.int32),
        logits=logits[:, vocabulary].numpy(),
        logsumexp=torch.logsumexp(logits.double(), -1).numpy(),
        dialogues=np.array(dialogues, np.int32),
        nll=np.array(nll),
        response_tokens=np.array(counts, np.int32),
    )
    print(f"{_FILE.name}: {_FILE.stat().st_size / 1000:.0f} kB, {len(nll)} responses, {sum(counts)} tokens, {sum(nll)}")


if __name__ == "__main__":
    main()
