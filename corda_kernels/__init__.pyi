from . import errors as errors
from . import kernels as kernels
from .adapter import CordaLinear as CordaLinear
from .adapter import adapter_factors as adapter_factors
from .adapter import export_lora as export_lora
from .adapter import load_for_training as load_for_training
from .adapter import merge as merge
from .adapter import save_adapter as save_adapter
from .calibration import CovarianceSet as CovarianceSet
from .calibration import calibrate as calibrate
from .calibration import calibrate_blocks as calibrate_blocks
from .init import CordaConfig as CordaConfig
from .init import init_corda as init_corda
from .linalg import co_svd as co_svd
from .linalg import co_svd_layers as co_svd_layers
from .linalg import regularized_inverse as regularized_inverse
from .models import load_model as load_model
from .models import load_tokenizer as load_tokenizer
from .planning import allocate_ranks as allocate_ranks
from .planning import mix_covariances as mix_covariances
from .planning import select_covariance as select_covariance
from .text import token_batches as token_batches
from .training import CompactnessPenalty as CompactnessPenalty
from .training import DriftPenalty as DriftPenalty
from .training import RankSchedule as RankSchedule

__version__: str
