"""Images, labels and splits: readers, transforms, loaders, named data sets, audits."""
