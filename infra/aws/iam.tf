# What each part may do, and no more; attach the policies to your roles or users.

# whoever uploads: writes captures, reads nothing
data "aws_iam_policy_document" "uploader" {
  statement {
    sid       = "Upload"
    actions   = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.all["captures"].arn}/*"]
  }
}

# the workers: read captures, write assets and store
data "aws_iam_policy_document" "worker" {
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetBucketLocation"]
    resources = [for bucket in aws_s3_bucket.all : bucket.arn]
  }

  statement {
    sid       = "ReadCaptures"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.all["captures"].arn}/*"]
  }

  statement {
    sid     = "Publish"
    actions = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = [
      "${aws_s3_bucket.all["assets"].arn}/*",
      "${aws_s3_bucket.all["store"].arn}/*",
    ]
  }
}

# the poller (and a receiver): takes notifications, looks whether the capture is complete and published, submits a run
data "aws_iam_policy_document" "poller" {
  statement {
    sid = "TakeNotifications"
    actions = [
      "sqs:ReceiveMessage",
      "sqs:DeleteMessage",
      "sqs:ChangeMessageVisibility",
      "sqs:GetQueueAttributes",
      "sqs:GetQueueUrl",
    ]
    resources = [aws_sqs_queue.uploads.arn]
  }

  statement {
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetBucketLocation"]
    resources = [for bucket in aws_s3_bucket.all : bucket.arn]
  }

  statement {
    sid     = "LookAtCapturesAndAssets"
    actions = ["s3:GetObject"]
    resources = [
      "${aws_s3_bucket.all["captures"].arn}/*",
      "${aws_s3_bucket.all["assets"].arn}/*",
    ]
  }

  statement {
    sid       = "Ledger"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
    resources = ["${aws_s3_bucket.all["store"].arn}/_ledger/*"]
  }
}

resource "aws_iam_policy" "uploader" {
  name   = "${var.prefix}-uploader"
  policy = data.aws_iam_policy_document.uploader.json
}

resource "aws_iam_policy" "worker" {
  name   = "${var.prefix}-worker"
  policy = data.aws_iam_policy_document.worker.json
}

resource "aws_iam_policy" "poller" {
  name   = "${var.prefix}-poller"
  policy = data.aws_iam_policy_document.poller.json
}
