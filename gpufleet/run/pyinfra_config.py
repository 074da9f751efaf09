"""pyinfra's configuration file (`pyinfra --config`): makes the run report to the fleet command."""

from gpufleet.run.follow import follow

follow()
