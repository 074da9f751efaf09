"""Every setting with its default. Copy a line into your inventory, or into a file here that is
named after one of its groups, and change it there; later groups win. A dictionary may be partial:
what it leaves out keeps its default."""

# What the model runs on: `cpu`, which leaves kernel and driver alone, or `cuda`.
accelerator = "cpu"

# The system to serve: a file of catalog/models/, without .yaml, or the path of an own such file.
model = "pico"

# What runs the model: `modern` is this project's application, `upstream` (MiniGPT-4 only) the
# original code of Vision-CAIR in the environment of its time.
runtime = "modern"

# Folder on the host that holds environments, weights, configuration and application.
root = "/opt/minigpt4"

# The account that the demo runs as; made if missing, without a password or a shell.
user = "minigpt4"

base = {
    # Distribution packages to install besides those that gpufleet needs.
    "packages": [],
}

mirrors = {
    # Where apt, pip, uv, conda and others get packages on the host: a site of catalog/mirrors.yaml
    # (nju, tuna, aliyun, ...) or of `sites` below; `auto`: what works and is fastest from that
    # host. `official` writes nothing, and puts back what an earlier site replaced.
    "site": "official",
    # Services (apt, pypi, conda, miniconda, miniforge, torch, cuda_apt, hf) that get another site
    # than `site` says, or `official`: {"conda": "nju"}.
    "pinned": {},
    # Own sites beside the catalogue's, such as a company's mirror, in the catalogue's format:
    # {"work": {"hosts": ["mirror.example.net"], "services": {"pypi": {"index": "/pypi/simple"}}}}.
    # They may be http: {"scheme": "http"}.
    "sites": {},
    # The cloud that the host is in (aliyun, tencent, huawei, ctyun, volces): its own internal
    # mirror comes first with `auto`, and sites that refuse that cloud are left out.
    "provider": "",
    # Sites that `auto` never takes.
    "exclude": [],
    # Hours that a measurement of the sites holds.
    "ttl_hours": 168,
    # How many times as fast another site must be for `auto` to leave the one in use.
    "hysteresis": 1.5,
    # An address that clones from GitHub go through, such as a company's git mirror. It is given to
    # git per command and never written down. None: none.
    "git_proxy": None,
    # Also take security updates from the mirror. Off, because a mirror may lag by a day.
    "apt_security": False,
}

driver = {
    # Where the NVIDIA driver comes from: `distribution` (the distribution's own packages),
    # `nvidia` (NVIDIA's CUDA repository), `nvidia-cn` (its host in China), `runfile` (the file
    # below), or `present`: it must be there already.
    "source": "distribution",
    # Driver branch, such as 535. None: one that fits GPUs and CUDA and that the source has.
    "branch": None,
    # CUDA that the driver must run, such as 12.2. None: that of the demo's locked environment.
    "cuda": None,
    # Flavour of the kernel modules: `open`, `proprietary`, or what all GPUs of the host can use.
    "modules": "auto",
    # The .run file on this machine that source `runfile` installs.
    "runfile": None,
    # A unit that builds or loads the module at boot, before the demo, where it is missing.
    "boot_guard": False,
}

kernel = {
    # Keep kernel and driver as they are, once they work together, until the settings change.
    "pin": True,
    # Where another kernel than the pinned one runs: `adopt` pins that one once it works,
    # `revert` boots the pinned one again.
    "drift": "adopt",
    # Whether apply may reboot a host: `never`, or `when-safe`: where the next kernel has a
    # working module, as a trial boot that falls back by itself.
    "reboot": "never",
    # Seconds that a host may take to come back from a reboot.
    "reboot_timeout": 900,
}

rolling = {
    # Apply to one host of each kind (OS, kernel flavour, GPU, driver) before all others.
    "canary": True,
    # How many hosts are applied to at once after the canaries; 0 is all.
    "batch": 0,
}

python_env = {
    # What makes environments: `miniconda` or `miniforge` (in ROOT/conda), or `uv` alone, with the
    # host's own python.
    "manager": "miniconda",
    # Another environment beside the demo's own (`modern`): one of catalog/environments.yaml, such
    # as `upstream-2023`, or the path of an environment.yml on this machine.
    "environment": "modern",
    # Conda's installer: the path of a file on this machine, or a file name in the mirror's folder.
    # None: the one that catalog/environments.yaml names, from the mirror.
    "installer": None,
    # The installer's sha256, where it is not the catalogue's.
    "installer_sha256": None,
    # Offer the command conda in login shells, by a file in /etc/profile.d.
    "shell_init": False,
    # CUDA toolkit to install from NVIDIA's repository, without a driver, such as "11.8", for
    # packages that are compiled against it. None: none.
    "cuda_toolkit": None,
    # `wheelhouse`: this machine's own pip downloads the wheels, once, and rsync brings them to
    # the hosts, which need no way out. `index`: each host downloads for itself. `auto`: index on
    # hosts with GPUs, where they are 2.8 GiB for each host, wheelhouse on others.
    "source": "auto",
    # Where the build of torch without CUDA comes from when the index that pip is configured with
    # does not have it: PyTorch's wheel site or a mirror of it. Builds for CUDA come from beside it.
    "torch_index": "https://download.pytorch.org/whl/cpu",
}

weights = {
    # Folder on this machine with the model's files. None: the catalogue's own folder in the
    # checkout (only pico has one), else the store of `fleet weights fetch`.
    "source": None,
    # Where `fleet weights fetch` looks first, of a set's sources: huggingface or modelscope.
    "hub": "huggingface",
    # How files travel to the hosts: `rsync` from this machine to each, or `swarm`: the hosts
    # exchange pieces among themselves. `auto` chooses by size, number of hosts and whether they
    # reach each other.
    "via": "auto",
    # Hosts that rsync sends to at a time; 0 is all.
    "at_once": 0,
    # Older versions that stay on a host once the demo is healthy on the new one.
    "keep": 1,
    # Upload limit in KiB/s, of each host with rsync and of all together in a swarm; 0 is none.
    "bandwidth_kib": 0,
    # Hide what the hosts of a swarm exchange from the network between them, at twice the CPU
    # time. What this machine sends goes through SSH in any case.
    "encrypt": False,
}

demo = {
    # Address the demo listens on. 127.0.0.1 is reached through `fleet tunnel`. Open it to a network
    # only with `auth_file`, or behind something that asks for passwords.
    "bind": "127.0.0.1",
    # Port the demo listens on.
    "port": 7860,
    # CPU threads of torch; 0 lets torch choose.
    "threads": 0,
    # What the model computes in: fp32, fp16, bf16, or 8bit and 4bit, which need a GPU. `auto`: as
    # the catalogue has it, and that is fp16 on a GPU and fp32 on a CPU where it says nothing.
    "precision": "auto",
    # Processes that serve the model, with nginx in front of several; 0 is one a GPU, one on cpu.
    "processes": 0,
    # A file on the operator's machine with USER:PASSWORD lines: page and API ask for one of them.
    # None: nobody is asked.
    "auth_file": None,
    # Questions that may wait while one is answered; more are refused with 503.
    "queue": 8,
    # Seconds from a question's arrival to the end of its answer; then it is ended with 504.
    "max_seconds": 300,
    # systemd's MemoryMax for the service, such as 24G.
    "memory_max": "infinity",
    # Seconds that loading the model may take.
    "start_timeout": 900,
}

upstream = {
    # Which state of Vision-CAIR's code runtime `upstream` runs: one of catalog/upstream.yaml.
    "version": "2023-05",
    # Another commit than the version's, such as one of a fork that `git` or `source` has.
    "commit": None,
    # The address of a git mirror that hosts fetch the code from. None: GitHub, by way of
    # mirrors.git_proxy.
    "git": None,
    # A copy of the code on this machine, brought to hosts over SSH: the folder of a git
    # repository, a git bundle or a .tar.gz. None: each host fetches for itself.
    "source": None,
    # The sha256 of the .tar.gz. None: learnt at first sight, and compared from then on.
    "sha256": None,
    # Another environment than the version's: of catalog/environments.yaml, or the path of an
    # environment.yml on this machine.
    "environment": None,
    # More values for its configuration, as demo.py's --options takes them: {"run.seed": "7"}.
    "options": {},
}

health = {
    # Seconds that the demo has to answer the catalogue's question.
    "timeout": 120,
}

gateway = {
    # Run nginx on this host, before the demos of all hosts of the inventory.
    "enabled": False,
    # Address that it listens on.
    "bind": "127.0.0.1",
    # Port that it listens on.
    "port": 8080,
}
