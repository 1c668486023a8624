"""`dialog_jax COMMAND` and `python -m dialog_jax COMMAND`: imports the chosen command only, to start quickly."""

import sys

COMMANDS = {
    "train": "fine-tunes a model on dialogues, or resumes a run",
    "audit": "reports what training would see in the data, and what is wrong with it",
    "show": "prints one dialogue as training sees it: its tree, its weights, its branches",
    "check": "verifies on your model and data that one pass equals K passes",
    "score": "writes the loss of every response in a file of dialogues",
    "select": "chooses the responses to train on by their scores",
    "compare": "prints a held-out dialogue and the replies of several models",
    "export": "writes a trained model as a Hugging Face directory",
    "chat": "chats with a model in the terminal",
    "plot": "draws loss over steps, and held-out loss by turn",
    "diagnose": "says why a run does not learn, and what to change",
    "init": "writes a commented config for a model and data, or from one of Axolotl",
    "plan": "estimates whether a run fits given devices, and how fast it would be",
    "report": "writes one HTML page about a run, its data and its dialogues",
}


def main() -> int:
    """Runs the command that the arguments name, and returns its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print("usage: dialog_jax COMMAND [--help] [--FLAG=VALUE ...]\n")
        for command, summary in COMMANDS.items():
            print(f"  {command:9} {summary}")
        return 0
    if name not in COMMANDS:
        print(f"dialog_jax: {name!r} is not a command; the commands are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 1
    from dialog_jax.commands import entry

    return entry.run(name, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
