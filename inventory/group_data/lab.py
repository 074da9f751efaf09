"""Settings of the lab's hosts (inventory/lab.py): containers on this machine, without a GPU."""

accelerator = "cpu"
model = "pico"
