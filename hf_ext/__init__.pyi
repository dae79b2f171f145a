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
from .trainers.adpo_config import ADPOConfig as ADPOConfig
from .trainers.adpo_trainer import ADPOTrainer as ADPOTrainer
from .trainers.spo_config import SPOConfig as SPOConfig
from .trainers.spo_pipeline import SPOPipeline as SPOPipeline
from .trainers.spo_pipeline import SPORound as SPORound
from .trainers.spo_trainer import SPOTrainer as SPOTrainer

__version__: str
