"""How a host is reached with ssh, and where its demo is."""

from gpufleet.run.forward import command
from gpufleet.run.targets import Target


def test_ssh_goes_the_way_that_pyinfra_goes():
    target = Target(
        "gpu1", "10.0.0.1", user="ops", port=2222, key="/k/key", known_hosts="/k/known_hosts"
    )
    assert target.ssh("-N") == [
        *("ssh", "-N", "-p", "2222", "-l", "ops", "-i", "/k/key", "-o", "IdentitiesOnly=yes"),
        *("-o", "UserKnownHostsFile=/k/known_hosts"),
        *("-o", "StrictHostKeyChecking=accept-new", "10.0.0.1"),
    ]


def test_a_target_reads_as_user_address_and_port():
    assert str(Target("gpu1", "10.0.0.1", user="ops")) == "ops@10.0.0.1:22"
    assert str(Target("gpu1", "fd00::1", user="ops", port=2222)) == "ops@[fd00::1]:2222"
    assert str(Target("@local", "@local", connector="local")) == "@local"


def test_a_tunnel_ends_at_the_demo_on_the_host_and_starts_on_this_machine_only():
    options = command(Target("gpu1", "10.0.0.1", demo_address="10.0.0.1", demo_port=9000), 6006)
    assert options[options.index("-L") + 1] == "127.0.0.1:6006:10.0.0.1:9000"


def test_a_demo_that_listens_everywhere_is_reached_at_the_hosts_loopback():
    assert Target("g", "a", demo_address="0.0.0.0").forward(1) == "127.0.0.1:1:127.0.0.1:7860"
    assert Target("g", "a", demo_address="::").forward(1) == "127.0.0.1:1:[::1]:7860"
    assert not Target("g", "a", demo_address="0.0.0.0").demo_is_local
    assert Target("g", "a").demo_is_local
