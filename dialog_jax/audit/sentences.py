"""An audit's figures as sentences, for a terminal and for a page."""

from dialog_jax.audit.figures import Audit
from dialog_jax.audit.row_lengths import Spread

FILL_HEADINGS = ("max_length", "rows", "full", "divided", "repeated", "shortened", "left out", "targets lost")


def describe_figures(audit: Audit) -> list[tuple[str, str]]:
    """Returns (heading, sentence) of each figure."""
    refused = audit.records - audit.dialogues
    sentences = [
        (
            "dialogues",
            f"{audit.records:,} records" + (f", {refused:,} of them refused" if refused else "") + f"; {audit.trees:,} "
            "dialogues have something to train on",
        )
    ]
    if not audit.trees:
        return sentences
    untrained = f", {audit.untrained:,} assistant messages are not" if audit.untrained else ""
    sentences.append(("responses", f"{audit.responses:,} are trained on{untrained}"))
    sentences.append(
        (
            "tokens",
            f"{audit.tokens:,}, of them {audit.targets:,} targets ({audit.targets / audit.tokens:.1%})",
        )
    )
    if audit.responses:
        sentences.append(
            (
                "one pass",
                f"{audit.k_pass_tokens / audit.tokens:.1f} times fewer tokens than the {audit.k_pass_tokens:,} of "
                f"{audit.responses:,} separate sequences, one per response",
            )
        )
    changed = f"rendered differently from how it was generated in {audit.changed:,} of {audit.trees:,} dialogues"
    sentences.append(("history", changed if audit.changed else "rendered as it was generated, in every dialogue"))
    if audit.branching:
        sentences.append(("branches", f"{audit.branching:,} of {audit.trees:,} trees branch; the others are one path"))
    if audit.not_verbatim:
        sentences.append(
            (
                "as recorded",
                f"{audit.not_verbatim:,} of {audit.responses:,} responses are rendered differently from what is "
                f"recorded, the first {audit.first_not_verbatim[0]}; data.responses=verbatim trains what is recorded",
            )
        )
    sentences += [("end of turn", _end_of_turn(audit)), ("beginning", _beginning(audit))]
    if audit.soft_prompt:
        sentences.append(("soft prompt", f"{audit.soft_prompt:,} tokens of each row"))
    for heading, spread in (
        ("tokens of a dialogue", audit.dialogue_tokens),
        ("tokens of a response", audit.response_tokens),
        ("responses of a dialogue", audit.responses_each),
    ):
        if spread is not None:
            sentences.append((heading, _spread(spread)))
    return sentences


def _spread(spread: Spread) -> str:
    return f"median {spread.median:,}, 95 % at most {spread.most:,}, longest {spread.longest:,} ({spread.where})"


def _end_of_turn(audit: Audit) -> str:
    if audit.end_of_turn is None:
        return "the chat template writes no special token after a response"
    trained = audit.last_targets.get(audit.end_of_turn, 0)
    return f"{audit.end_of_turn} is the last target of {trained:,} of {audit.responses:,} responses"


def _beginning(audit: Audit) -> str:
    if audit.bos is None:
        return "the tokenizer has no BOS token"
    added = (
        "the tokenizer itself would add one: give it rendered text with add_special_tokens=False"
        if audit.bos_added
        else "the tokenizer itself adds none"
    )
    return f"{audit.bos_written:,} of {audit.trees:,} dialogues begin with BOS ({audit.bos}); {added}"


def name_roles(audit: Audit) -> dict[str, int]:
    """Returns the number of tokens by origin, under the names that a reader sees."""
    names = {
        "responses": "trained responses, end of turn included",
        "rest": "the chat template" + (", and history that it renders differently" if audit.changed else ""),
    }
    return {names.get(role, f"{role} messages"): tokens for role, tokens in audit.roles.items()}


def list_fills(audit: Audit) -> list[list[str]]:
    """Returns the figures of rows of each length, under `FILL_HEADINGS`."""
    return [
        [
            f"{fill.max_length:,}",
            f"{fill.rows:,}",
            f"{fill.used:.1%}",
            f"{fill.divided:,}",
            f"{fill.repeated:,}",
            f"{fill.shortened:,}",
            f"{fill.cut:,}",
            f"{fill.targets_lost:.2%}",
        ]
        for fill in audit.fills
    ]
