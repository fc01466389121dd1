"""The yardstick: features of a folder of JPEGs with Keras alone, as a careful user writes it today.

    python tests/benchmarks/baseline_keras.py IMAGES OUT.npz --weights FILE [--size 160]

tf.data decodes, resizes and preprocesses in parallel and prefetches; `predict` runs MobileNetV2 with average pooling in
batches. Nothing of this project is imported. A test holds the sha256 of this file, so that ratios of different days
have one denominator. Do not change it: a better yardstick is a new file.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a folder of class folders")
    parser.add_argument("out", help="the features and their paths, as an .npz file")
    parser.add_argument("--weights", required=True, help="MobileNetV2's weights without its classifier")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()

    import keras
    import numpy as np
    import tensorflow as tf

    dataset = keras.utils.image_dataset_from_directory(
        options.images,
        image_size=(options.size, options.size),
        batch_size=options.batch_size,
        shuffle=False,
        verbose=False,
    )
    paths = dataset.file_paths
    batches = dataset.map(
        lambda images, _: keras.applications.mobilenet_v2.preprocess_input(images), num_parallel_calls=tf.data.AUTOTUNE
    ).prefetch(tf.data.AUTOTUNE)
    model = keras.applications.MobileNetV2(
        input_shape=(options.size, options.size, 3), include_top=False, pooling="avg", weights=options.weights
    )
    features = model.predict(batches, verbose=0)
    np.savez(options.out, features=features, paths=paths)


if __name__ == "__main__":
    main()
