from .caches.sink_window import SinkWindowConfig as SinkWindowConfig
from .caches.sirllm import SirLLMConfig as SirLLMConfig
from .cla.config import CLAConfig as CLAConfig
from .data.bucket_sampler import BucketBatchSampler as BucketBatchSampler
from .data.decompose import decompose as decompose
from .flags import HfExtConfig as HfExtConfig
from .optim.arguments import fadam_optimizer as fadam_optimizer
from .optim.fadam import FAdam as FAdam
from .patches.caches import make_cache as make_cache
from .patches.install import install as install
from .patches.install import uninstall as uninstall
from .trainers.fadam import FAdamTrainerMixin as FAdamTrainerMixin

__version__: str
