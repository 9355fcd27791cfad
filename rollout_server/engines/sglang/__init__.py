"""SGLang as the engine. Only this folder knows it.

engine.py      the Engine contract: lives of SGLang, groups
loading.py     versions: checked, swapped in, checked again
life.py        what belongs to one life of SGLang and ends with it
generation.py  one group on its way through: seats, requests, aborts
admission.py   how many samples SGLang is given at once, and who waits
adapters.py    versions that are adapters: which SGLang has, and until when
swap.py        a new version on its way in, and the look at what SGLang then holds
sparse.py      what differs from the version before, in place of all weights (its other end is inside_sglang/)
check.py       pure: whether an engine holds the weights it says it holds
host.py        who runs SGLang: a child process of ours, or somebody else (engine_url)
child.py       one child: starting, hearing of its death, ending it with all it started
command.py     pure: the child's command line and environment
client.py      SGLang's HTTP calls, typed
answers.py     pure: what a request says, and what its answer means
schema.py      the model's tensors by name and shape, and whether a version fits them
watch.py       SGLang's state while it works: how full it is, whether it gets on
meter.py, progress.py   pure: counters over time; whether work still gets done
restarts.py    pure: when the next life begins
"""

from rollout_server.engines.sglang.engine import SGLangEngine

__all__ = ["SGLangEngine"]
