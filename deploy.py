"""The whole deploy, in order. Run it with: pyinfra inventory/NAME.py deploy.py

Every concern is idempotent: what is right is left alone, what drifted is put right. One concern
runs alone as, for example: pyinfra inventory/NAME.py tasks.config.config
"""

from gpufleet.run.only import selected
from tasks.base import base
from tasks.config import config
from tasks.demo import demo
from tasks.driver import driver
from tasks.gateway import gateway
from tasks.health import health
from tasks.kernel import kernel
from tasks.mirrors import mirrors
from tasks.preflight import preflight
from tasks.python_env import python_env
from tasks.upstream import upstream
from tasks.weights import weights

# First, and always: all findings of all hosts, before any host changes.
preflight()

# Before any download: where packages come from.
if selected("mirrors"):
    mirrors()

if selected("base"):
    base()

# The driver before the kernel: only a kernel that the driver works on is pinned.
if selected("driver"):
    driver()
if selected("kernel"):
    kernel()

if selected("python_env"):
    python_env()
if selected("weights"):
    weights()
if selected("config"):
    config()
if selected("upstream"):
    upstream()

# The service starts only on a host where everything before it went well.
if selected("demo"):
    demo()
if selected("health"):
    health()
# Last: it asks demos that answer.
if selected("gateway"):
    gateway()
