from .caches.sink_window import SinkWindowConfig as SinkWindowConfig
from .caches.sirllm import SirLLMConfig as SirLLMConfig
from .cla.config import CLAConfig as CLAConfig
from .flags import HfExtConfig as HfExtConfig
from .patches.caches import make_cache as make_cache
from .patches.install import install as install
from .patches.install import uninstall as uninstall

__version__: str
