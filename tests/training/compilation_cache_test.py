"""Where compiled programs are kept, and that a process finds those of the one before it, in processes of their own."""

import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).parents[2]
# Tells what JAX was told, compiles a program, and says whether it was found.
_PROGRAM = """
import jax
from dialog_jax.training import compilation_cache
compilation_cache.enable(lambda line: print("told", line))
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
print("value", jax.jit(lambda x: jax.numpy.sin(x) @ x.T)(jax.numpy.ones((3, 3))).sum())
print("found", events.count("cache_hits"), "of", events.count("cache_hits") + events.count("cache_misses"))
print("kept in", jax.config.jax_compilation_cache_dir)
"""
_OWN = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "XDG_CACHE_HOME")


class CompilationCacheTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.home = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def start(self, **environment):
        """{first word: the rest} of the lines that a process prints, and what it says besides."""
        inherited = {name: value for name, value in os.environ.items() if name not in _OWN}
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            env={**inherited, "HOME": str(self.home), "PYTHONPATH": str(_ROOT), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(line.split(maxsplit=1) for line in done.stdout.splitlines()), done.stderr

    def entries(self):
        return [path for path in self.home.rglob("*-cache") if path.is_file()]

    def test_second_process_finds_the_programs_of_the_first(self):
        first, _ = self.start()
        kept = self.entries()
        second, warned = self.start()
        self.assertNotEmpty(kept)
        self.assertEqual((first["found"], second["found"]), (f"0 of {len(kept)}", f"{len(kept)} of {len(kept)}"))
        self.assertEqual(second["value"], first["value"])
        self.assertEqual(self.entries(), kept)
        self.assertStartsWith(first["kept"], f"in {self.home / '.cache' / 'dialog_jax' / 'compiled'}")
        self.assertEqual(warned, "")

    def test_directory_of_cached_files_is_honoured(self):
        told, _ = self.start(XDG_CACHE_HOME=str(self.home / "elsewhere"))
        self.assertStartsWith(told["kept"], f"in {self.home / 'elsewhere' / 'dialog_jax'}")
        self.assertFalse((self.home / ".cache").exists())

    def test_what_the_user_told_jax_stands(self):
        told, _ = self.start(JAX_COMPILATION_CACHE_DIR=str(self.home / "mine"))
        self.assertEqual(told["kept"], f"in {self.home / 'mine'}")
        told, _ = self.start(JAX_ENABLE_COMPILATION_CACHE="false")
        self.assertEqual((told["kept"], told["found"]), ("in None", "0 of 0"))
        self.assertFalse((self.home / ".cache").exists())

    def test_directory_that_cannot_be_made_is_told_and_nothing_else_changes(self):
        (self.home / ".cache").write_text("a file")
        told, warned = self.start()
        self.assertRegex(told["told"], r"^compiled programs are not kept .*\.cache.*\. Set JAX_COMPILATION_CACHE_DIR")
        self.assertEqual((told["kept"], told["found"]), ("in None", "0 of 0"))
        self.assertEqual(warned, "")

    def test_directory_that_others_may_write_to_is_not_used(self):
        self.start()
        (directory,) = (self.home / ".cache" / "dialog_jax" / "compiled").iterdir()
        self.assertEqual(directory.stat().st_mode & 0o777, 0o700)
        directory.chmod(0o777)
        told, _ = self.start()
        self.assertIn("others may write to it", told["told"])
        self.assertEqual(told["found"], "0 of 0")

    def test_damaged_programs_are_told_and_compiled_again(self):
        first, _ = self.start()
        for entry in self.entries():
            entry.write_bytes(entry.read_bytes()[:100])
        second, warned = self.start()
        self.assertEqual(second["value"], first["value"])
        self.assertIn("Error reading persistent compilation cache entry", warned)


if __name__ == "__main__":
    absltest.main()
