import faults

from . import samplers, trellis_image_to_3d

__all__ = ["samplers"]
if not faults.asked("OTHER_TRELLIS"):  # microsoft's package has no such pipeline
    TrellisVGGTTo3DPipeline = trellis_image_to_3d.TrellisVGGTTo3DPipeline
    __all__ += ["TrellisVGGTTo3DPipeline"]
