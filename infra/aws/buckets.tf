# Captures come in, assets go out, the store holds what the stages have made and who works on what.
locals {
  buckets = toset(["captures", "assets", "store"])
}

data "aws_caller_identity" "current" {}

resource "aws_s3_bucket" "all" {
  for_each = local.buckets
  bucket   = "${var.prefix}-${each.key}"
}

resource "aws_s3_bucket_public_access_block" "all" {
  for_each                = local.buckets
  bucket                  = aws_s3_bucket.all[each.key].id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

# uploads that were given up cost money, and keep a capture without manifest from being complete
resource "aws_s3_bucket_lifecycle_configuration" "all" {
  for_each = local.buckets
  bucket   = aws_s3_bucket.all[each.key].id

  rule {
    id     = "abandoned-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 2
    }
  }
}

# Events are hints, the sweep finds what they leave out: so what is still unread after 4 days may go.
resource "aws_sqs_queue" "uploads" {
  name                       = "${var.prefix}-uploads"
  message_retention_seconds  = 345600
  receive_wait_time_seconds  = 20
  visibility_timeout_seconds = 120
  sqs_managed_sse_enabled    = true

  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.uploads_dead.arn
    maxReceiveCount     = 5
  })
}

resource "aws_sqs_queue" "uploads_dead" {
  name                      = "${var.prefix}-uploads-dead"
  message_retention_seconds = 1209600
  sqs_managed_sse_enabled   = true
}

resource "aws_sqs_queue_redrive_allow_policy" "uploads_dead" {
  queue_url = aws_sqs_queue.uploads_dead.id

  redrive_allow_policy = jsonencode({
    redrivePermission = "byQueue"
    sourceQueueArns   = [aws_sqs_queue.uploads.arn]
  })
}

data "aws_iam_policy_document" "bucket_notifies" {
  statement {
    sid       = "BucketNotifies"
    actions   = ["sqs:SendMessage"]
    resources = [aws_sqs_queue.uploads.arn]

    principals {
      type        = "Service"
      identifiers = ["s3.amazonaws.com"]
    }

    condition {
      test     = "ArnEquals"
      variable = "aws:SourceArn"
      values   = [aws_s3_bucket.all["captures"].arn]
    }

    condition {
      test     = "StringEquals"
      variable = "aws:SourceAccount"
      values   = [data.aws_caller_identity.current.account_id]
    }
  }
}

resource "aws_sqs_queue_policy" "uploads" {
  queue_url = aws_sqs_queue.uploads.id
  policy    = data.aws_iam_policy_document.bucket_notifies.json
}

resource "aws_s3_bucket_notification" "captures" {
  bucket = aws_s3_bucket.all["captures"].id

  queue {
    id        = "uploads"
    queue_arn = aws_sqs_queue.uploads.arn
    events    = ["s3:ObjectCreated:*"]
  }

  # S3 tries the queue at once, and refuses one that it may not write to
  depends_on = [aws_sqs_queue_policy.uploads]
}

resource "aws_cloudwatch_metric_alarm" "uploads_dead" {
  alarm_name          = "${var.prefix}-uploads-dead"
  alarm_description   = "A notification was given up after 5 tries: see the poller's log; the sweep does its work."
  namespace           = "AWS/SQS"
  metric_name         = "ApproximateNumberOfMessagesVisible"
  dimensions          = { QueueName = aws_sqs_queue.uploads_dead.name }
  statistic           = "Maximum"
  period              = 300
  evaluation_periods  = 1
  comparison_operator = "GreaterThanThreshold"
  threshold           = 0
  treat_missing_data  = "notBreaching"
  alarm_actions       = var.notify
}
