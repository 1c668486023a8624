"""Joining a run: what is said when flags are missing or wrong, and where JAX detects no cluster."""

import os
import subprocess
import sys

from absl.testing import absltest, parameterized

from dialog_jax.training import distributed
from tests.commands import running


class StartTest(parameterized.TestCase):
    @parameterized.parameters(
        ((None, 2, 0), "--coordinator_address missing: pass"),
        (("10.0.0.1:80", None, None), "--num_processes and --process_id missing: pass"),
        (("10.0.0.1", 2, 0), "--coordinator_address is '10.0.0.1'; it must be HOST:PORT"),
        (("10.0.0.1:80", 2, 2), "--process_id is 2 and --num_processes 2; ids are 0 to"),
        (("10.0.0.1:80", 2, -1), "--process_id is -1 and --num_processes 2; ids are 0 to"),
    )
    def test_wrong_flags_are_explained(self, flags, message):
        with self.assertRaisesRegex(ValueError, message):
            distributed.start(*flags)

    def test_no_cluster_is_said_with_the_remedy(self):
        clusters = ("SLURM", "OMPI", "KUBERNETES", "TPU", "JAX_", "MEGASCALE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
        code = (
            "from dialog_jax.training import distributed\n"
            "try: distributed.start()\nexcept ValueError as error: print(error)"
        )
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
        told = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout
        self.assertRegex(told, r"--distributed: JAX detects no cluster here .*Slurm.*--coordinator_address=HOST:PORT")

    def test_flags_of_many_hosts_need_distributed(self):
        _, error = running.run(
            "train",
            "--config=experiments/quickstart.py",
            f"--output_dir={self.create_tempdir().full_path}/run",
            "--num_processes=2",
        )
        self.assertRegex(
            error, "dialog_jax train: --coordinator_address, .* are for runs on many hosts. Add --distributed"
        )


if __name__ == "__main__":
    absltest.main()
