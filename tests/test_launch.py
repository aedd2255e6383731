"""What starts a command as many processes: on paper, on this host, on a Slurm of the test's own."""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHON": sys.executable,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
}


def wait_until(condition, seconds, what):
    """The first true value of condition(), where there is one in time; what() says more if not."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not in {seconds} seconds: {what()}"
        time.sleep(0.1)
    return value


def lines(folder, process):
    """What tests/process_group.py wrote at each of its starts."""
    path = folder / f"process_{process}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- On paper ----------------------------------------------------------------------------------


def test_scripts_are_found():
    assert [path.name for path in SCRIPTS] == [
        "local.sh",
        "slurm.sbatch",
        "slurm_array.sbatch",
        "tpu_vm.sh",
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_say_how_to_use_them(path):
    subprocess.run(["bash", "-n", path], check=True)
    done = subprocess.run(["bash", path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.search(rf"launch/{path.name} .*MODULE \[FLAG\.\.\.\]", done.stderr)
    assert "set -" not in done.stderr


@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_array.sbatch"])
def test_slurm_options(name):
    options = re.findall(r"^#SBATCH (--\S+)$", (LAUNCH / name).read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=TERM@120"} <= set(options)
    assert any(option.startswith("--gres=gpu:") for option in options)
    # With it each task sees one GPU, while JAX looks for the one of the task's number.
    assert not any(option.startswith("--gpus-per-task") for option in options)


def test_jobset():
    job_set = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert job_set["kind"] == "JobSet"
    spec, name = job_set["spec"], job_set["metadata"]["name"]
    assert spec["network"] == {"enableDNSHostnames": True, "subdomain": name}
    assert spec["failurePolicy"]["maxRestarts"] > 0
    [replicated] = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    [container] = pod["containers"]
    python, option, module = container["command"]
    assert (python, option) == (".venv/bin/python", "-m")
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in container["args"])
    # Process 0 is the first pod of the only job: NAME-JOB-0-0.SUBDOMAIN.
    host, port = flags["coordinator_address"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{spec['network']['subdomain']}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert int(flags["num_processes"]) == job["parallelism"] == job["completions"]
    [variable] = container["env"]
    assert flags["process_id"] == f"$({variable['name']})"
    assert "job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert "resume" in flags
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert "persistentVolumeClaim" in volume
    for folder in (flags["out"], container["workingDir"]):
        assert Path(mount["mountPath"]) in Path(folder).parents


def test_readme_names_every_file():
    table = re.findall(r"^\| `launch/(\S+?)[ `]", (LAUNCH / "README.md").read_text(), re.MULTILINE)
    files = {path.name for path in LAUNCH.iterdir()} - {"README.md"}
    assert set(table) == files
    assert "(launch/README.md)" in (ROOT / "README.md").read_text()


def test_tpu_vm_quotes_for_the_other_end(tmp_path):
    # In place of gcloud: what it was asked, and what a shell at the other end would start.
    (tmp_path / "gcloud").write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "${@:1:7}"\nbash -c "${8#--command=}"\n'
    )
    python = tmp_path / "a folder" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\npwd\nprintf "%s\\n" "$@"\n')
    for file in (tmp_path / "gcloud", python):
        file.chmod(0o755)
    flags = ["--weight_decay=0.1,0.2", "--out=/mnt/it's $HOME"]
    folder = str(tmp_path / "a folder")
    done = subprocess.run(
        [LAUNCH / "tpu_vm.sh", "slice", "zone", folder, "experiments.dufm_training", *flags],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
        text=True,
    )
    asked, started = done.stdout.splitlines()[:7], done.stdout.splitlines()[7:]
    assert asked == ["compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=zone", "--worker=all"]
    auto = "--coordinator_address=auto"
    assert started == [folder, "-m", "experiments.dufm_training", auto, *flags]


# --- On this host ------------------------------------------------------------------------------


def local(*arguments, **environment):
    """launch/local.sh, started."""
    return subprocess.Popen(
        [LAUNCH / "local.sh", *map(str, arguments)],
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_local_processes_form_one_group(tmp_path):
    with local(2, "process_group", f"--out={tmp_path}", "--text=it's $HOME") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    for index in range(2):
        [line] = lines(tmp_path, index)
        assert line["process_count"] == 2
        assert line["gathered"] == [0, 1]
        assert line["local_devices"] == str(index)
        assert line["arguments"][-1] == "--text=it's $HOME"


def test_local_forwards_sigterm_and_waits(tmp_path):
    with local(2, "process_group", f"--out={tmp_path}", "--wait") as process:
        wait_until(lambda: lines(tmp_path, 0) and lines(tmp_path, 1), 60, lambda: "start")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert {path.name for path in tmp_path.glob("saved_*")} == {"saved_0", "saved_1"}


def worker(folder, code):
    """A module that is no JAX program: has `index`, the process, and then does `code`."""
    (folder / "worker.py").write_text(
        "import signal, sys, time\n"
        "[flag] = [one for one in sys.argv if one.startswith('--process_id=')]\n"
        f"index = int(flag.partition('=')[2])\n{code}\n"
    )
    return {"PYTHONPATH": str(folder)}


def test_local_returns_the_first_failure_and_stops_the_others(tmp_path):
    code = f"""
def stop(*_):
    open({str(tmp_path)!r} + f"/saved_{{index}}", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if index == 1:
    time.sleep(1)
    sys.exit(7)
time.sleep(60)"""
    started = time.monotonic()
    with local(3, "worker", **worker(tmp_path, code)) as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 7, output
    assert {path.name for path in tmp_path.glob("saved_*")} == {"saved_0", "saved_2"}
    assert time.monotonic() - started < 20


def test_local_kills_who_does_not_stop(tmp_path):
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if index == 0:
    time.sleep(1)
    sys.exit(3)
print("deaf", flush=True)
time.sleep(60)"""
    started = time.monotonic()
    with local(2, "worker", GRACE="1", **worker(tmp_path, code)) as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 3, output
    assert "deaf" in output
    assert time.monotonic() - started < 20


# --- On a Slurm --------------------------------------------------------------------------------

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue", "scontrol")


def free_ports(count):
    """Ports of this host that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


class Slurm:
    """A Slurm of one node with two CPUs and two GPUs in name, in a folder, on loopback.

    Everything that it starts is found by SLURM_CONF in its environment, and ends with `stop`.
    """

    def __init__(self, folder):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {**ENVIRONMENT, "SLURM_CONF": str(self.conf)}
        self.daemons = []

    def start(self):
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        controller, node = free_ports(2)
        # The port of JAX's coordinator follows from the number of the job, from 61440 on.
        first = random.randrange(1, 4000)
        gpus = [self.folder / f"gpu{index}" for index in range(2)]
        for gpu in gpus:
            gpu.touch()
        self.conf.write_text(
            f"""ClusterName=test
SlurmctldHost=localhost
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
SlurmdPort={node}
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd.log
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
FirstJobId={first}
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2
PartitionName=all Nodes=localhost Default=YES
"""
        )
        (self.folder / "gres.conf").write_text(
            "".join(f"NodeName=localhost Name=gpu File={gpu}\n" for gpu in gpus)
        )
        version = subprocess.check_output(["slurmctld", "-V"], text=True).split()[-1]
        if tuple(map(int, version.split(".")[:2])) >= (24, 5):  # Earlier ones do not know the word.
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        munge = {"key-file": key, "socket": self.folder / "munge.socket"}
        munge |= {f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        # It would have sockets where every user can go, which a test's folder is not.
        options = ["--foreground", "--force", "--num-threads=1"]
        self.daemon("munged", *options, *(f"--{name}={value}" for name, value in munge.items()))
        wait_until((self.folder / "munge.socket").exists, 10, self.logs)
        self.daemon("slurmctld", "-D")
        self.daemon("slurmd", "-D", "-N", "localhost")
        # As a node of the cluster, which it becomes once it has reported.
        idle = ["sinfo", "--noheader", "--format=%t"]
        wait_until(lambda: self.run(*idle, check=False) == "idle", 20, self.logs)

    def stop(self):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.run("scancel", "--user=root")
            wait_until(lambda: not self.run("squeue", "--noheader"), 10, self.logs)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self.daemons:
            daemon.wait(timeout=10)
        wait_until(lambda: not self.processes(), 10, self.logs)
        shutil.rmtree(self.folder)

    def daemon(self, *command):
        with (self.folder / f"{command[0]}.out").open("wb") as file:
            process = subprocess.Popen(
                command, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
        self.daemons.append(process)

    def processes(self):
        """All processes with the SLURM_CONF of this cluster, this one not among them."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def run(self, *command, check=True):
        """What a command of Slurm's prints."""
        done = subprocess.run(
            command,
            env=self.environment,
            check=check,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            timeout=20,
        )
        return done.stdout.strip()

    def submit(self, log, *arguments):
        """The number of a new job, which writes into `log`."""
        return self.run(
            "sbatch", "--parsable", "--cpus-per-task=1", f"--output={log}", *map(str, arguments)
        )

    def job(self, number):
        """What Slurm knows of a job, in words."""
        pairs = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

    def requeue(self, number):
        """Ends a running job as a preemption does, and has it started again without delay."""
        self.run("scontrol", "requeue", number)
        wait_until(lambda: self.job(number)["JobState"] == "PENDING", 40, self.logs)
        # Slurm would wait two minutes.
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait(self, number, log, condition):
        """Waits while a job runs, as long as a start or a short training takes at most."""

        def done():
            # Its state first: a job may end well in between.
            alive = self.job(number)["JobState"] in ("PENDING", "RUNNING", "COMPLETING")
            value = condition()
            assert value or alive, told()
            return value

        def told():
            return log.read_text() if log.exists() else self.logs()

        wait_until(done, 90, told)

    def finish(self, number, log):
        """What Slurm knows of a job that has ended well."""
        self.wait(number, log, lambda: self.job(number)["JobState"] == "COMPLETED")
        return self.job(number)

    def logs(self):
        """The last lines of the daemons."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"{file.name}: {file.read_text()[-1000:]}" for file in files)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"No {', '.join(missing)} here.")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons start the jobs as root.")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


TWO_TASKS = ("--ntasks-per-node=2", "--gres=gpu:2", LAUNCH / "slurm.sbatch")


def test_slurm_tasks_form_one_group_and_survive_a_requeue(slurm, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    number = slurm.submit(log, *TWO_TASKS, "process_group", f"--out={out}", "--wait")
    slurm.wait(number, log, lambda: lines(out, 0) and lines(out, 1))
    slurm.requeue(number)
    assert {path.name for path in out.glob("saved_*")} == {"saved_0", "saved_1"}
    slurm.wait(number, log, lambda: len(lines(out, 0)) == len(lines(out, 1)) == 2)
    (out / "go").touch()
    job = slurm.finish(number, log)
    assert job["Restarts"] == "1"
    for index in range(2):
        first, second = lines(out, index)
        for line in (first, second):
            assert line["process_count"] == 2
            assert line["gathered"] == [0, 1]
            assert line["arguments"][:2] == ["--coordinator_address=auto", "--resume"]
        assert not first["found_saved"]
        assert second["found_saved"]
    # Both starts are in one log.
    assert "DUE TO JOB REQUEUE" in log.read_text()


def test_slurm_array_deals_out_seeds(slurm, tmp_path):
    array = ("--array=0-10:10", "--gres=gpu:1", LAUNCH / "slurm_array.sbatch")
    arguments = (tmp_path, "process_group", "--text=it's $HOME")
    number = slurm.submit(tmp_path / "log_%a", *array, *arguments)
    for first in (0, 10):
        slurm.finish(f"{number}_{first}", tmp_path / f"log_{first}")
        [line] = lines(tmp_path / f"seed_{first}", 0)
        assert line["process_count"] == 1
        assert line["arguments"] == [
            "--resume",
            "--text=it's $HOME",
            f"--first_seed={first}",
            "--num_seeds=10",
            f"--out={tmp_path}/seed_{first}",
        ]


def test_slurm_sweep_goes_on_after_a_requeue(slurm, tmp_path):
    # Six runs over two processes, interrupted, give what they give in one process undisturbed.
    sizes = {"num_classes": 4, "samples_per_class": 2, "depth": 3, "width": 6, "weight_decay": 0.01}
    sizes |= {"num_seeds": 6, "num_steps": 150_000}
    flags = ["--noreduce", *(f"--{name}={value}" for name, value in sizes.items())]
    log, out = tmp_path / "log", tmp_path / "out"
    number = slurm.submit(log, *TWO_TASKS, "experiments.dufm_training", *flags, f"--out={out}")

    def descends():
        files = {path.name for path in out.rglob("*") if path.is_file()} if out.exists() else set()
        return files - {"config.json"}

    slurm.wait(number, log, descends)
    slurm.requeue(number)
    assert not (out / "runs.csv").exists()
    assert "--resume" in log.read_text()  # The sentence with which the tasks ended.
    job = slurm.finish(number, log)
    assert job["Restarts"] == "1"

    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "experiments.dufm_training", *flags, f"--out={alone}"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    rows, expected = [
        list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
        for folder in (out, alone)
    ]
    assert [row["seed"] for row in rows] == [str(seed) for seed in range(6)]
    for row, other in zip(rows, expected, strict=True):
        assert row["steps"] == other["steps"]
        assert row["rank_2"] == other["rank_2"]
        # Each run is the same program; what may differ is rounding, for another number of devices.
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
