from common import run_cli
from loaders.show import show

run_cli(show)
