"""Which rows of a teacher's file belong to the nodes of a tree, checked against the tokens that the teacher scored.

In: a file (see `teacher_file`) and a dialogue's tree. Out: for each node a row of the file.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32, Int64

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.trees import prefix_tree, teacher_file
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher_file import TeacherFile
from dialog_jax.trees.weighting import SupervisedSequence


def find_rows(
    file: TeacherFile, dialogue: Dialogue, tree: Tree, sequences: Sequence[SupervisedSequence]
) -> Int64[np.ndarray, " N"]:
    """Returns for each node of a tree its row in the file; -1 where it is not a target in a response.

    For the file's first response, of 3 tokens, after a prompt of 2 tokens: [-1, -1, 0, 1, 2].

    Args:
      sequences: from which the tree was built.

    Raises:
      UserError: the file lacks a response, or has other tokens. Names the dialogue, the message and the token.
    """
    rows = np.full(len(tree.tokens), -1, np.int64)
    _, nodes_of_sequences = prefix_tree.build_trie([one.tokens for one in sequences])
    for one, nodes in zip(sequences, nodes_of_sequences, strict=True):
        sequence, index = one.sequence, one.original_index
        # A soft prompt is no part of the prompt that the teacher read, and nothing predicts a first token.
        virtual = sequence.virtual
        start = max(sequence.start, virtual + 1)
        if sequence.turn >= 0 and tree.weight[nodes[start:]].any():
            response = _find_response(file, dialogue, index)
            begin, end = file.response_offset[response : response + 2].tolist()
            # In a tree that was split off a longer one, some messages before a response are missing.
            has_full_prompt = one.excerpt.original_indices[: sequence.message_index] == dialogue.ancestors(index)
            prompt = int(file.response_prompt[response]) if has_full_prompt else None
            _check_response(
                file,
                f"{dialogue.name}: message {index}",
                sequence.tokens[virtual:],
                start - virtual,
                file.token[begin:end],
                prompt,
            )
            rows[nodes[start:]] = np.arange(begin, end)[: len(nodes) - start]
    rows[tree.weight == 0] = -1
    return rows


def read_rows(
    file: TeacherFile, rows: Int64[np.ndarray, " s"]
) -> tuple[Int32[np.ndarray, "s N"], Float32[np.ndarray, "s N"]]:
    """Returns (likeliest tokens, their log-probabilities) of rows of the file; row -1 has 0 and -inf."""
    scored = rows >= 0
    token = np.zeros((len(rows), file.top_k), np.int32)
    log_probability = np.full(token.shape, -np.inf, np.float32)
    token[scored], log_probability[scored] = file.top_token[rows[scored]], file.top_log_probability[rows[scored]]
    return token, log_probability


def _find_response(file: TeacherFile, dialogue: Dialogue, index: int) -> int:
    """Returns the number in the file of the response at a message index of a dialogue."""
    where = f"{dialogue.name}: message {index}"
    number = file.numbers.get(dialogue.id)
    if number is None:
        raise UserError(
            f"{where} has no teacher: {file.name} has no dialogue with this id. Score the dialogue, or leave it out."
        )
    first, last = np.searchsorted(file.response_dialogue, [number, number + 1])
    matches = first + np.flatnonzero(file.response_message[first:last] == index)
    if not len(matches):
        raise UserError(
            f"{where} has no teacher: {file.name} has only other messages of the dialogue. Its weight was 0 when the "
            "teacher scored it, or it exceeds the teacher's context. Score it, or give it weight 0."
        )
    return int(matches[0])


def _check_response(
    file: TeacherFile, where: str, tokens: Int32[np.ndarray, " n"], start: int, scored: np.ndarray, prompt: int | None
) -> None:
    """Raises UserError unless the response `tokens[start:]` is `scored` and its prompt has the checksum `prompt`."""
    cause = "the chat template or the dialogue has changed" if file.same_tokenizer else "the tokenizer differs"
    remedy = f"since the teacher scored it, {cause}. Score again with the present data."
    response = tokens[start:]
    place = prefix_tree.common_prefix_length(response, scored)
    if place < max(len(response), len(scored)):
        here, there = (f"is {ids[place]}" if place < len(ids) else "is missing" for ids in (response, scored))
        raise UserError(f"{where}, token {place}: its id {here} here, but {there} in {file.name}; {remedy}")
    if prompt is not None and prompt != teacher_file.checksum(tokens[:start]):
        raise UserError(f"{where}: {file.name} has the same response after another prompt; {remedy}")
