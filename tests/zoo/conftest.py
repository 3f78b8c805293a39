"""What the libraries of the zoo need before they are imported."""

import sys
import types

# torchvision's wheel is built for CUDA: beside a CPU build of torch its import fails where it registers operators
# (torchvision::nms), of which the models use none. An empty module in the place of that file lets it import, and
# transformers, which imports it where it is installed.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
