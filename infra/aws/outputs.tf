output "sqs_queue_url" {
  description = "CAPTURE2MESH_SQS_QUEUE_URL of the poller."
  value       = aws_sqs_queue.uploads.url
}

output "buckets" {
  description = "URLs of captures (CAPTURE2MESH_WATCHED), assets (CAPTURE2MESH_OUTPUT) and store (CAPTURE2MESH_STORE)."
  value       = { for name, bucket in aws_s3_bucket.all : name => "s3://${bucket.id}" }
}

output "policies" {
  description = "ARNs of the policies to attach."
  value = {
    uploader = aws_iam_policy.uploader.arn
    worker   = aws_iam_policy.worker.arn
    poller   = aws_iam_policy.poller.arn
  }
}
