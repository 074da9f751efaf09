"""A fleet to copy: cp inventory/example.py inventory/mine.py; ./fleet plan -i inventory/mine.py

Groups are lists; a host is an address or (name, data). All settings and their defaults are in
inventory/group_data/all.py. Keys that begin with ssh_ or _ are pyinfra's own.
"""

hosts = [
    # An address that your ~/.ssh/config knows needs nothing else.
    "demo-1.example.net",
    # A host with everything spelt out. Its settings win over the group's below.
    (
        "demo-2",
        {
            "ssh_hostname": "192.0.2.12",
            "ssh_port": 22,
            "ssh_user": "ubuntu",
            "ssh_key": "~/.ssh/id_ed25519",
            # Not root: become root for every change. Needs sudo without a password.
            "_sudo": True,
            # This one shares its machine with something else that listens on 7860.
            "demo": {"port": 7861, "memory_max": "8G"},
        },
    ),
]

# Hosts in China: packages from a mirror, wheels from this machine, one upload at a time at most
# 20 MiB/s a host.
china = (
    ["demo-3.example.net", "demo-4.example.net"],
    {
        "mirrors": {"site": "nju"},
        "python_env": {"torch_index": "https://mirrors.nju.edu.cn/pytorch/whl/cpu"},
        "weights": {"bandwidth_kib": 20480},
    },
)
