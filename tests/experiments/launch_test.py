"""The launch scripts, run with stand-ins for srun, scontrol, gcloud and the training, and the JobSets as data."""

import os
import pathlib
import re
import shlex
import signal
import string
import subprocess
import sys

import yaml
from absl.testing import absltest, parameterized

from dialog_jax.commands import config_flag
from tests.commands import running
from tests.experiments.stand_ins import SRUN, TRAINING, StandInsTest

_ROOT = pathlib.Path(__file__).parents[2]
_LAUNCH = _ROOT / "experiments" / "launch"
_DISTRIBUTED = ("distributed", "coordinator_address", "num_processes", "process_id")
_TRAIN = ["-m", "dialog_jax", "train"]
_FLAGS = ["--config=experiments/chitchat.py", "--output_dir=runs/a run", "--config.data.chat_template_kwargs={'a': 1}"]

# As gcloud with a TPU VM of one host, whose home is $HOST.
_GCLOUD = """
printf '%s\\0' "$@" >>"$NOTES/gcloud"
cd "$HOST"
case "$1 $2 $3 $4" in
  "compute tpus tpu-vm ssh") command=${!#}; HOME=$HOST exec bash -c "${command#--command=}" ;;
  "compute tpus tpu-vm scp") cp "$5" "$HOST/${6#*:}" ;;
  *) exit 3 ;;
esac
"""


def parse(arguments):
    """(TrainConfig, {flag of several hosts: its text}) of arguments of dialog_jax train, as it reads them itself."""
    # Kubernetes puts the host's number there.
    argv = [argument.replace("$(JOB_COMPLETION_INDEX)", "0") for argument in arguments]
    argv = [argument.replace("--config=experiments", f"--config={_ROOT}/experiments") for argument in argv]
    with running.loaded("train", *argv) as command:
        asked = config_flag.read(command._CONFIG)
    given = {argument.partition("=")[0].removeprefix("--"): argument.partition("=")[2] for argument in arguments}
    return asked, {name: given[name] for name in _DISTRIBUTED if name in given}


class SlurmTest(StandInsTest):
    def setUp(self):
        super().setUp()
        self.stand_in("srun", SRUN)
        self.stand_in("scontrol", 'echo "$*" >"$NOTES/scontrol"')
        self.environment |= {"SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "8"}

    def test_every_task_runs_the_training_with_the_flags(self):
        code, told = self.run_script("slurm.sh", *_FLAGS)
        self.assertEqual(code, 0, told)
        for task in (0, 1):
            arguments = self.noted(f"train.{task}")
            self.assertEqual(arguments[:3], _TRAIN)
            arguments = arguments[3:]
            self.assertEqual(arguments, ["--distributed", *_FLAGS])
        asked, hosts = parse(arguments)
        self.assertEqual(asked.data.chat_template_kwargs, {"a": 1})
        self.assertEqual(hosts, {"distributed": ""})
        options = (self.notes / "srun.options").read_text().split()
        self.assertEqual(options, ["--kill-on-bad-exit=1", "--cpus-per-task=8"])
        self.assertFalse((self.notes / "scontrol").exists())

    def test_before_the_time_is_up_the_run_saves_and_the_job_is_queued_again(self):
        process = self.start("slurm.sh", *_FLAGS, LASTS="1")
        self.wait_for("started.0", "started.1")
        process.send_signal(signal.SIGUSR1)
        self.assertEqual(process.wait(30), 0)
        self.assertTrue((self.notes / "saved.0").exists() and (self.notes / "saved.1").exists())
        self.assertEqual((self.notes / "scontrol").read_text(), "requeue 4711\n")

    def test_job_whose_steps_are_told_to_end_saves_and_is_not_queued_again(self):
        process = self.start("slurm.sh", *_FLAGS, LASTS="1")
        self.wait_for("started.0", "started.1")
        os.kill(int((self.notes / "srun.pid").read_text()), signal.SIGTERM)
        self.assertEqual(process.wait(30), 0)
        self.assertTrue((self.notes / "saved.0").exists() and (self.notes / "saved.1").exists())
        self.assertFalse((self.notes / "scontrol").exists())

    def test_failure_of_the_training_is_that_of_the_job(self):
        code, _ = self.run_script("slurm.sh", *_FLAGS, CODE="7")
        self.assertEqual(code, 7)
        self.assertFalse((self.notes / "scontrol").exists())

    def test_job_that_is_started_elsewhere_is_refused(self):
        code, told = self.run_script("slurm.sh", *_FLAGS, cwd=self.directory)
        self.assertEqual(code, 2)
        self.assertIn("Call sbatch in the root of the repository", told)

    def test_jax_finds_the_tasks_by_the_variables_of_slurm(self):
        told = """import jax
jax.distributed.initialize()
print(f"task {jax.process_index()} of {jax.process_count()}\\n", end="")"""
        self.stand_in("training", f"exec {shlex.quote(sys.executable)} -c {shlex.quote(told)}")
        code, told = self.run_script("slurm.sh")
        self.assertEqual(code, 0, told)
        self.assertIn("task 0 of 2", told)
        self.assertIn("task 1 of 2", told)

    def test_options_give_a_task_to_every_gpu_and_hide_none(self):
        lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (_LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
        options = dict(lines)
        self.assertEqual(options["ntasks-per-node"], options["gpus-per-node"])
        self.assertNoCommonElements(options, ["gpus-per-task", "gpu-bind", "ntasks"])
        self.assertEqual(options["signal"], "B:USR1@120")
        self.assertIn("requeue", options)
        self.assertEqual(options["open-mode"], "append")


class HostOfJobSetTest(StandInsTest):
    def test_finished_training_ends_the_pod_with_success(self):
        code, _ = self.run_script("gke_host.sh", *_FLAGS)
        self.assertEqual(code, 0)
        self.assertEqual(self.noted("train.0"), [*_TRAIN, "--distributed", *_FLAGS])

    def test_failure_of_the_training_is_that_of_the_pod(self):
        self.assertEqual(self.run_script("gke_host.sh", CODE="7")[0], 7)

    @parameterized.parameters(("0", 143), ("7", 7))
    def test_pod_that_is_told_to_end_saves_and_does_not_count_as_done(self, code, expected):
        process = self.start("gke_host.sh", LASTS="1", CODE=code)
        self.wait_for("started.0")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(30), expected)
        self.assertTrue((self.notes / "saved.0").exists())


class JobSetTest(parameterized.TestCase):
    """The manifests with the variables that their first lines name."""

    def read(self, name):
        """(the manifest, its one job, its one container, its variables)."""
        text = (_LAUNCH / name).read_text()
        head = re.split(r"^apiVersion", text, flags=re.MULTILINE)[0]
        exported = [line[1:].partition(" # ")[0] for line in head.splitlines() if "export " in line]
        variables = dict(re.findall(r"([A-Z]+)=(\S+)", " ".join(exported)))
        substituted = re.search(r"envsubst '([^']*)'", head)[1].split()
        self.assertCountEqual(substituted, [f"${name}" for name in variables])
        self.assertEqual(set(re.findall(r"\$\{([A-Z]+)\}", text)), set(variables))
        manifest = yaml.safe_load(string.Template(text).safe_substitute(variables))
        (job,) = manifest["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        return manifest, job, container, variables

    @parameterized.parameters("gke_jobset_tpu.yaml", "gke_jobset_gpu.yaml")
    def test_jobset_starts_one_pod_a_host_and_restarts_all_when_one_fails(self, name):
        manifest, job, container, variables = self.read(name)
        self.assertEqual((manifest["apiVersion"], manifest["kind"]), ("jobset.x-k8s.io/v1alpha2", "JobSet"))
        self.assertGreater(manifest["spec"]["failurePolicy"]["maxRestarts"], 0)
        spec = job["template"]["spec"]
        self.assertEqual(spec["parallelism"], int(variables["HOSTS"]))
        self.assertEqual(spec["completions"], int(variables["HOSTS"]))
        self.assertEqual((spec["completionMode"], spec["backoffLimit"]), ("Indexed", 0))
        pod = spec["template"]["spec"]
        self.assertEqual(pod["restartPolicy"], "Never")
        self.assertEqual(
            [volume["name"] for volume in pod["volumes"]], [mount["name"] for mount in container["volumeMounts"]]
        )
        self.assertEqual(container["command"], ["bash", "experiments/launch/gke_host.sh"])
        self.assertTrue((_ROOT / container["command"][1]).exists())
        output_dir = next(flag for flag in container["args"] if flag.startswith("--output_dir=")).partition("=")[2]
        self.assertStartsWith(output_dir, container["volumeMounts"][0]["mountPath"] + "/")

    def test_slice_of_tpus_fits_its_hosts_and_rows(self):
        _, job, container, variables = self.read("gke_jobset_tpu.yaml")
        asked, hosts = parse(container["args"])
        chips = int(variables["HOSTS"]) * container["resources"]["limits"]["google.com/tpu"]
        height, width = map(int, variables["TOPOLOGY"].split("x"))
        self.assertEqual(chips, height * width)
        self.assertEqual(asked.rows % (chips * job["replicas"]), 0)
        self.assertEmpty(hosts)  # JAX finds them

    def test_nodes_of_gpus_are_told_who_they_are(self):
        manifest, job, container, variables = self.read("gke_jobset_gpu.yaml")
        asked, hosts = parse(container["args"])
        self.assertEqual(job["replicas"], 1)
        self.assertEqual(hosts["num_processes"], variables["HOSTS"])
        self.assertEqual(hosts["process_id"], "$(JOB_COMPLETION_INDEX)")
        name = manifest["metadata"]["name"]
        self.assertRegex(hosts["coordinator_address"], rf"^{name}-{job['name']}-0-0\.{name}:\d+$")
        gpus = int(variables["HOSTS"]) * container["resources"]["limits"]["nvidia.com/gpu"]
        self.assertEqual(asked.rows % gpus, 0)

    def test_flags_given_to_xpk_are_those_of_the_training(self):
        text = (_LAUNCH / "gke_jobset_tpu.yaml").read_text()
        asked, _ = parse(re.search(r'FLAGS="([^"]*)"', text)[1].split())
        chips = int(re.search(r"--tpu-type=v5litepod-(\d+)", text)[1])
        self.assertEqual(asked.rows % chips, 0)


class TpuVmTest(StandInsTest):
    def setUp(self):
        super().setUp()
        self.host = self.directory / "host"
        (self.host / "dialog_jax" / ".venv" / "bin").mkdir(parents=True)
        self.stand_in("gcloud", _GCLOUD)
        self.stand_in("python", TRAINING, self.host / "dialog_jax" / ".venv" / "bin")
        self.environment |= {"TPU": "a-tpu", "ZONE": "a-zone", "HOST": str(self.host)}

    def call(self, *arguments, **variables):
        return self.run_script("tpu_vm.sh", *arguments, **variables)

    def test_training_starts_on_all_hosts_with_the_flags(self):
        code, told = self.call("train", *_FLAGS)
        self.assertEqual(code, 0, told)
        self.wait_for("train.0")
        self.assertEqual(self.noted("train.0"), [*_TRAIN, "--distributed", *_FLAGS])
        *command, run = self.noted("gcloud")
        self.assertEqual(command, ["compute", "tpus", "tpu-vm", "ssh", "a-tpu", "--zone=a-zone", "--worker=all"])
        self.assertStartsWith(run, "--command=")

    def test_training_that_is_told_to_stop_saves_first_and_one_that_runs_is_not_started_again(self):
        self.assertEqual(self.call("train", *_FLAGS, LASTS="1")[0], 0)
        self.wait_for("started.0")
        code, told = self.call("train", *_FLAGS)
        self.assertEqual(code, 1)
        self.assertIn("a training is running here", told)
        code, told = self.call("stop")
        self.assertEqual(code, 0)
        self.assertTrue((self.notes / "saved.0").exists())
        self.assertEndsWith(told, "saved\n")
        self.assertIn("no training is running here", self.call("stop")[1])

    def test_setup_unpacks_the_repository_and_installs_it_for_tpus(self):
        self.stand_in("git", f"tar -czf ${{3#--output=}} -C {_ROOT} dialog_jax")
        uv = self.host / ".local" / "bin"
        uv.mkdir(parents=True)
        self.stand_in("uv", "exit 3", uv)  # the environment is there already
        code, told = self.call("setup")
        self.assertEqual(code, 0, told)
        self.assertTrue((self.host / "dialog_jax" / "dialog_jax" / "__main__.py").exists())
        self.assertEqual(self.noted("train.0"), ["-m", "pip", "install", "--quiet", "--editable", ".[tpu]"])

    def test_command_runs_in_the_repository_of_all_hosts(self):
        code, told = self.call("run", "echo", "it's here", "$HOME")
        self.assertEqual((code, told), (0, "it's here $HOME\n"))
        self.assertIn("--worker=all", self.noted("gcloud"))

    def test_usage_is_shown_for_anything_else(self):
        for arguments in ((), ("delete",)):
            code, told = self.call(*arguments)
            self.assertEqual(code, 2)
            self.assertIn("tpu_vm.sh stop", told)
        self.assertFalse((self.notes / "gcloud").exists())

    def test_nothing_that_costs_is_made_or_deleted(self):
        commands = [line for line in (_LAUNCH / "tpu_vm.sh").read_text().splitlines() if not line.startswith("#")]
        called = {match for line in commands for match in re.findall(r"\bgcloud \w+ \w+ [\w-]+ (\w+)", line)}
        self.assertEqual(called, {"ssh", "scp"})


class ShellTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(_LAUNCH.glob("*.sh")))
    def test_script_is_sound(self, file):
        shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
        for command in (["bash", "-n"], [shellcheck]):
            checked = subprocess.run([*command, file], capture_output=True, text=True)
            self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)


if __name__ == "__main__":
    absltest.main()
