"""The kinds of findings about dialogues as training data: severity, meaning and remedy of each.

This module has the sentences only; `findings` counts.
"""

from typing import NamedTuple

from dialog_jax.rendering import written


class Kind(NamedTuple):
    """A kind of finding."""

    level: str
    """`error`: training would stop, or teach what cannot be intended. `warning`: check it. `note`: for information."""
    what: str
    total: str
    """Name of the total that the count is a part of; empty for a finding that occurs at most once."""
    remedy: str


# In the order of the report.
KINDS = {
    "unreadable": Kind(
        "error",
        "records that are not valid dialogues",
        "records",
        "Training stops at the first. Correct or remove them, or leave them out with data.on_error=skip.",
    ),
    "refused": Kind(
        "error",
        "dialogues that the chat template refuses, or renders so that they cannot be trained",
        "records",
        "Training stops at the first. Change or remove them, pass another chat template, or set data.on_error=skip.",
    ),
    "unreadable_skipped": Kind(
        "warning",
        "records that are not valid dialogues",
        "records",
        "Training leaves them out, as data.on_error says, and lists all in skipped.txt. Correct or remove them.",
    ),
    "refused_skipped": Kind(
        "warning",
        "dialogues that the chat template refuses, or renders so that they cannot be trained",
        "records",
        "Training leaves them out, as data.on_error says, and lists all in skipped.txt. Change or remove them.",
    ),
    "needs_verbatim": Kind(
        "error",
        "dialogues whose responses the chat template does not render as a continuation of their prompts",
        "records",
        "Training stops at the first. Set data.responses=verbatim, which trains these as they are recorded, pass "
        "another chat template, or set data.on_error=skip.",
    ),
    "needs_verbatim_skipped": Kind(
        "warning",
        "dialogues whose responses the chat template does not render as a continuation of their prompts",
        "records",
        "They are left out, as data.on_error says. Set data.responses=verbatim, which trains them as recorded.",
    ),
    "lost": Kind(
        "error",
        "dialogues with a response of which the chat template writes nothing that its message says",
        "records",
        "Training stops at the first. Pass a chat template that writes it, or set data.on_error=skip.",
    ),
    "lost_skipped": Kind(
        "warning",
        "dialogues with a response of which the chat template writes nothing that its message says",
        "records",
        "They are left out, as data.on_error says. Pass a chat template that writes it.",
    ),
    "nothing": Kind(
        "error",
        "no dialogue has anything to train on",
        "",
        "Give assistant messages a weight above 0, or choose another objective.",
    ),
    "beyond_embedding": Kind(
        "error",
        "the tokenizer has token ids for which the model has no embedding",
        "",
        "Training stops. Use the tokenizer that belongs to the model, or add rows with --config.resize_embedding.",
    ),
    "doubled_bos": Kind(
        "error",
        "dialogues that begin with two BOS tokens",
        "trees",
        "At inference there is one. Remove one from the chat template, or from the contents.",
    ),
    "no_target": Kind(
        "warning",
        "dialogues with nothing to train on",
        "dialogues",
        "They are left out. Give an assistant message a weight above 0, or remove them.",
    ),
    "no_end_of_turn": Kind(
        "warning",
        "the chat template writes no special token after a response",
        "",
        "The model learns no token at which generation can stop. Pass a chat template that ends turns with one.",
    ),
    "end_untrained": Kind(
        "warning",
        "responses whose last target is not the end of turn",
        "responses",
        "The model does not learn to stop there. Check what the chat template writes after them, and the weights of "
        "their last parts.",
    ),
    "missing_bos": Kind(
        "warning",
        "the chat template writes no BOS, which the tokenizer adds to plain text",
        "",
        "The model probably saw it before every text. Compare the template with its publisher's.",
    ),
    "prompt": Kind(
        "warning",
        "responses that change the tokens at the end of their prompt when both are tokenized together",
        "responses",
        "They are trained as they would be generated, after the prompt's tokens; elsewhere the same text has other "
        "tokens. End the generation prompt at a token boundary, usually without white space.",
    ),
    "replaced_tokenizer": Kind(
        "warning",
        "transformers does not tokenize as tokenizer.json says, which is followed here",
        "",
        "Serve the model with tokens of the file: it is exported byte for byte, for PreTrainedTokenizerFast.",
    ),
    "stored_settings": Kind(
        "warning",
        "tokenizer.json stores settings of whoever saved it, which would change texts; they are switched off here",
        "",
        "Remove them from the file, so that no other program applies them.",
    ),
    "cut": Kind(
        "warning",
        "responses left out because they are longer than a row with their history",
        "responses",
        "Raise max_length. With truncate=split, only those are left out for which no history is short enough.",
    ),
    "shortened": Kind(
        "note",
        "responses trained behind the system prompt and recent turns, because all of their history is too long",
        "responses",
        "Raise max_length to train them with all of it.",
    ),
    "divided": Kind(
        "note",
        "dialogues whose tree is larger than a row",
        "trees",
        "Each is divided into trees that repeat some of the history, so that every response has all of its own.",
    ),
    "empty": Kind(
        "warning",
        "trained responses without text",
        "responses",
        "They teach the model to end its turn at once. Remove them, or set their weight to 0.",
    ),
    "content_not_written": Kind(
        "warning",
        written.KINDS["content"][0],
        "responses",
        "The model learns something else. Set data.responses=verbatim unless they have tool calls, or pass another "
        "chat template.",
    ),
    "reasoning_not_written": Kind(
        "warning",
        written.KINDS["reasoning"][0],
        "responses",
        "The model learns to answer without it. Set data.responses=verbatim, or pass another chat template.",
    ),
    "reasoning_end_not_written": Kind(
        "warning",
        written.KINDS["reasoning_end"][0],
        "responses",
        "The model learns to answer without ending its reasoning. Record both, or pass another chat template.",
    ),
    "tool_calls_not_written": Kind(
        "warning",
        written.KINDS["tool_calls"][0],
        "responses",
        "The model does not learn to make them. Pass a chat template that writes tool calls, or write them into the "
        "content.",
    ),
    "tools_not_written": Kind(
        "warning",
        written.KINDS["tools"][0],
        "dialogues",
        "The model does not see them. Pass a chat template that writes tools, or write them into the system message.",
    ),
    "message_not_written": Kind(
        "warning",
        written.KINDS["message"][0],
        "messages",
        "The model sees something else in their place, or nothing. Use a chat template that supports their role.",
    ),
    "unread_tools": Kind(
        "warning",
        "tools or calls of tools that the chat template does not read",
        "",
        "The model neither sees nor learns them. Pass a chat template that writes them.",
    ),
    "special_parsed": Kind(
        "warning",
        "messages with the text of special tokens",
        "messages",
        "It is parsed as those tokens, so the text of a message can end a turn. Remove it, unless that is intended.",
    ),
    "repeated": Kind(
        "warning",
        "dialogues that are the same as an earlier one",
        "trees",
        "Each is trained on again. Remove them, unless that is intended.",
    ),
    "clock": Kind(
        "note",
        "the chat template writes the time of rendering into prompts",
        "",
        "It is fixed once per run. Set data.template_time to choose it.",
    ),
    "same_prompt": Kind(
        "note",
        "other dialogues that begin with the same prompt as an earlier one",
        "trees",
        "Keep them on one side of a split into training and held-out data.",
    ),
    "special": Kind(
        "note",
        "messages with the text of special tokens",
        "messages",
        "It is ordinary text to the model. If those tokens are intended, set allow_special_tokens.",
    ),
    "history": Kind(
        "note",
        "dialogues whose history the chat template renders differently from how it was generated",
        "trees",
        "They are trained exactly, with branches. Trainers that mask a single rendering train on text that inference "
        "never shows.",
    ),
    "prompt_changed": Kind(
        "note",
        "dialogues in which the chat template renders a prompt differently once its response follows",
        "trees",
        "The response is trained after the prompt that inference shows, with branches.",
    ),
    "next": Kind(
        "note",
        "responses whose last tokens change when the next message follows",
        "responses",
        "They are trained exactly, with branches.",
    ),
    "text_arguments": Kind(
        "warning",
        "messages with tool calls whose arguments are text, but not a JSON object",
        "messages",
        "Templates that write arguments as JSON write them as a string. Correct them, unless that is intended.",
    ),
    "weight_unused": Kind(
        "note",
        "messages with a weight that are no responses, so that the objective does not train on them",
        "messages",
        "To train on them as well, set objective.name=roles and objective.roles.",
    ),
    "nulls": Kind(
        "note",
        "dialogues with null fields in arguments or parameters, which are left out",
        "dialogues",
        "Exports of tables have them where a field is absent. To keep a null, write arguments or tools as JSON text.",
    ),
    "unread": Kind(
        "note",
        "keys that neither the program nor the chat template reads",
        "",
        "They have no effect in the dialogues in which they were changed. Check whether one of them is misspelled, or "
        "needs another chat template.",
    ),
    "unanswered": Kind(
        "note",
        "dialogues that do not end with an assistant message",
        "dialogues",
        "What follows the last response is not trained on, unless the objective is joint or roles.",
    ),
}
