"""Every setting with its default. Copy a line into your inventory, or into a file here that is
named after one of its groups, and change it there; later groups win. A dictionary may be partial:
what it leaves out keeps its default."""

# What the model runs on. `cpu` leaves kernel and driver alone; `cuda` is refused until this
# version brings a locked CUDA environment.
accelerator = "cpu"

# The system to serve: a file of catalog/models/, without .yaml.
model = "pico"

# Folder on the host that holds environments, weights, configuration and application.
root = "/opt/minigpt4"

# The account that the demo runs as; made if missing, without a password or a shell.
user = "minigpt4"

base = {
    # Distribution packages to install besides those that gpufleet needs.
    "packages": [],
}

mirrors = {
    # A site of catalog/mirrors.yaml (nju, tuna, aliyun, ...) that apt, pip, uv and conda use on
    # the host. `official` writes nothing, and puts back what an earlier site replaced.
    "site": "official",
    # Also take security updates from the mirror. Off, because a mirror may lag by a day.
    "apt_security": False,
}

python_env = {
    # What makes the demo's environment.
    "manager": "uv",
    # `wheelhouse`: this machine's own pip downloads the wheels, once, and rsync brings them to
    # the hosts, which need no way out. `index`: each host downloads for itself.
    "source": "wheelhouse",
    # Where the build of torch without CUDA comes from when the index that pip is configured with
    # does not have it: PyTorch's wheel site or a mirror of it.
    "torch_index": "https://download.pytorch.org/whl/cpu",
}

weights = {
    # Folder on this machine with the model's files. None: the catalogue's own folder in the
    # checkout (only pico has one).
    "source": None,
    # Upload limit a host in KiB/s; 0 is none.
    "bandwidth_kib": 0,
}

demo = {
    # Address the demo listens on. 127.0.0.1 is reached through `fleet tunnel`. The demo has no
    # passwords: open it to a network only behind something that has.
    "bind": "127.0.0.1",
    # Port the demo listens on.
    "port": 7860,
    # CPU threads of torch; 0 lets torch choose.
    "threads": 0,
    # Questions that may wait while one is answered; more are refused with 503.
    "queue": 8,
    # systemd's MemoryMax for the service, such as 24G.
    "memory_max": "infinity",
    # Seconds that loading the model may take.
    "start_timeout": 900,
}

health = {
    # Seconds that the demo has to answer the catalogue's question.
    "timeout": 120,
}
