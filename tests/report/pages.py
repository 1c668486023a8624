"""A run with its data, made without training, for reports of it; and a reader of pages, in NumPy."""

import base64
import dataclasses
import gzip
import json
import re

import numpy as np

from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import sessions
from dialog_jax.training.config import DataConfig, TrainConfig
from tests.commands import running
from tests.training import hand_made

ATTACK = "<script>document.title = 'attacked'</script></script><!-- <b>é 🙂</b>"
TURNS = [{"turn": turn, "loss": 4.0 - turn / 4, "accuracy": 0.25, "targets": 300 - turn} for turn in range(3)]


def records():
    """Dialogues: of several turns, with two answers to a message, with weights, and with text that looks like HTML."""
    hello = {"role": "user", "content": "Hello"}
    plain = {"id": "plain", "messages": [hello, {"role": "assistant", "content": "I am fine"}]}
    longer = {
        "id": "longer",
        "messages": [
            {"role": "system", "content": "Be kind."},
            *[
                {
                    "role": ("user", "assistant")[i % 2],
                    "content": f"And the {'first' if i % 2 else 'next'} question {i}?",
                }
                for i in range(10)
            ],
        ],
    }
    answers = {
        "id": "answers",
        "messages": [hello, {"role": "assistant", "content": "Hi", "train": False}, hello],
        "continuations": ["Hello, friend!", "Yes, this is the answer"],
    }
    weighted = {
        "id": "weighted",
        "messages": [hello, {"role": "assistant", "content": "fine", "weight": 0.5}, hello, plain["messages"][1]],
    }
    attack = {
        "id": "</script><script>document.title = 'attacked'</script>",
        "messages": [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": ATTACK}],
    }
    return [plain, longer, answers, weighted, attack]


def write_run(directory, name="run", *, seed=1, whole=False):
    """Writes base, data and a run there, of all weights or with LoRA and a soft prompt; returns the three paths."""
    base, data, run = directory / "base", directory / "data.jsonl", directory / name
    directory.mkdir(exist_ok=True)
    if not base.exists():
        hand_made.save_model(base, max_length=512)
        data.write_text("".join(json.dumps(record) + "\n" for record in records()))
    config = TrainConfig(model=str(base), data=DataConfig(train=str(data), validation=str(data), max_length=256))
    if not whole:
        lora = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj"))
        config = dataclasses.replace(config, lora=lora, soft_prompt=SoftPromptConfig(tokens=3))
    hand_made.make_run(run, config, base, losses={0: 4.0, seed: 3.0})
    figures = {"gradient_norm": 1.0, "learning_rate": 1e-4, "skipped": 0, "seconds": 1.5, "tokens": 200, "targets": 90}
    speeds = {"tokens_per_second": 133.0, "response_tokens_per_second": 60.0}
    steps = [{"step": step, "loss": 4.0 - step / 8, **figures, **speeds} for step in range(1, 7)]
    evaluations = [
        {"step": step, "loss": loss, "accuracy": 0.25, "targets": 897, "turns": TURNS}
        for step, loss in ((0, 4.0), (seed, 3.0))
    ]
    for file, lines in (("metrics.jsonl", steps), ("evaluation.jsonl", evaluations)):
        (run / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    sessions.add_session(run, 0)
    return base, data, run


def write_report(directory, run, data, base, *flags):
    """(the page, what the command printed, its errors)."""
    out = directory / "report.html"
    told, error = running.run(
        "report",
        f"--run={run}",
        f"--base={base}",
        f"--config.data.train={data}",
        f"--config.data.validation={data}",
        f"--out={out}",
        *flags,
    )
    return out.read_text(encoding="utf-8") if out.exists() else "", told, error


def read_data(html):
    """What the page's list and charts are made of."""
    return json.loads(re.search(r'id="report-data">(.*?)</script>', html, re.DOTALL)[1])


def read_texts(html):
    """Texts and tokens by number."""
    return json.loads(_unpack(html, "texts"))


def read_dialogue(html, place):
    """The columns of a dialogue by name: losses [models, N], nan if not scored, and alternatives [models, K, N]."""
    report = read_data(html)
    size, count, width = report["dialogues"][place]["tokens"], len(report["models"]), 1 + 2 * report["alternatives"]
    planes = np.frombuffer(_unpack(html, f"dialogue-{place}"), np.uint8).reshape(6 + count * width, 4, size)
    columns = (planes.astype(np.uint32) << np.array([0, 8, 16, 24], np.uint32)[:, None]).sum(1, dtype=np.uint32)
    scores = columns[6:].reshape(count, width, size)
    return {
        "gap": columns[0],
        "text": columns[1],
        "token": columns[2],
        "message": columns[3].astype(np.int64) - 1,
        "turn": columns[4].astype(np.int64) - 1,
        "weight": columns[5].view(np.float32),
        "loss": np.where(scores[:, 0] == 2**32 - 1, np.nan, scores[:, 0] / report["nats"]),
        "top": scores[:, 1::2],
        "probability": scores[:, 2::2] / report["shares"],
    }


def _unpack(html, name):
    return gzip.decompress(base64.b64decode(re.search(rf'id="{name}">(.*?)</script>', html, re.DOTALL)[1]))
