{{/*
The pods of a cluster of our own, the same for Deployments and for a DaskCluster. Arguments of all:
root, role (scheduler, worker).
*/}}

{{/* Annotations for a Prometheus without the operator's kinds, as YAML; may be nothing. */}}
{{- define "memusage.scrapeAnnotations" -}}
{{- $monitors := .root.Values.monitors -}}
{{- $own := ternary $monitors.scheduler $monitors.workers (eq .role "scheduler") -}}
{{- if and $monitors.enabled $own.enabled (not (include "memusage.hasMonitors" .root)) -}}
prometheus.io/scrape: "true"
prometheus.io/port: {{ include "memusage.httpPort" . | quote }}
prometheus.io/path: {{ $own.path }}
{{- end -}}
{{- end -}}

{{- define "memusage.httpPort" -}}
{{- ternary "8787" "8788" (eq .role "scheduler") -}}
{{- end -}}

{{- define "memusage.podLabels" -}}
{{- $own := default dict (index .root.Values.cluster .role).podLabels | deepCopy -}}
{{- $ours := dict "app.kubernetes.io/component" .role "dask_cluster" (include "memusage.cluster" .root) -}}
{{- include "memusage.labelsWith" (dict "root" .root "more" (mergeOverwrite $own $ours) "pod" true) -}}
{{- end -}}

{{/* Arguments further: scrape, annotations as YAML. */}}
{{- define "memusage.podAnnotations" -}}
{{- $annotations := dict "checksum/config" (include "memusage.daskConfig" .root | sha256sum) -}}
{{- $own := default dict (index .root.Values.cluster .role).podAnnotations -}}
{{- mergeOverwrite $annotations (.scrape | fromYaml) $own | toYaml -}}
{{- end -}}

{{- define "memusage.arguments" -}}
{{- if eq .role "scheduler" -}}
- scheduler
- --port
- "8786"
- --dashboard-address
- ":8787"
{{- else -}}
- worker
- --name
- $(DASK_WORKER_NAME)
- --nworkers
- "1"
- --nthreads
- {{ .root.Values.cluster.worker.threads | toString | quote }}
- --memory-limit
- $(WORKER_MEMORY_LIMIT)
- --worker-port
- "8789"
- --nanny-port
- "8790"
- --dashboard-address
- ":8788"
- --death-timeout
- "60"
{{- end }}
{{- range (index .root.Values.cluster .role).extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Each name once, the last: what is applied on the server's side may have none twice. */}}
{{- define "memusage.environment" -}}
{{- $seen := list -}}
{{- $lines := list -}}
{{- range include "memusage.variables" . | fromYamlArray | reverse -}}
{{- if not (has .name $seen) -}}
{{- $seen = append $seen .name -}}
{{- $lines = prepend $lines . -}}
{{- end -}}
{{- end -}}
{{- toYaml $lines -}}
{{- end -}}

{{/* The operator sets name and address of a worker's scheduler itself. */}}
{{- define "memusage.variables" -}}
{{- $values := .root.Values -}}
- {name: DASK_CONFIG, value: {{ include "memusage.configPath" . }}}
- {name: HOME, value: /tmp}
{{- if $values.package.install }}
- {name: PYTHONPATH, value: {{ $values.package.path }}/site}
{{- end }}
{{- if eq .role "worker" }}
- name: WORKER_MEMORY_LIMIT
  valueFrom: {resourceFieldRef: {containerName: worker, resource: limits.memory}}
{{- if eq $values.cluster.kind "plain" }}
- name: DASK_WORKER_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- {name: DASK_SCHEDULER_ADDRESS, value: "tcp://{{ include "memusage.cluster" .root }}-scheduler.{{ .root.Release.Namespace }}.svc:8786"}
{{- end }}
{{- end }}
{{- if include "memusage.telemetry" .root }}
# What OpenTelemetry cannot find out itself: there is no token to ask with. One that is given wins.
- name: K8S_NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: "k8s.namespace.name={{ .root.Release.Namespace }},k8s.node.name=$(K8S_NODE_NAME)"}
{{- end }}
{{- with $values.config.environment }}
{{ toYaml . }}
{{- end }}
{{- with (index $values.cluster .role).environment }}
{{ toYaml . }}
{{- end }}
{{- end -}}


{{- define "memusage.probe" -}}
{{- mergeOverwrite (dict "httpGet" (dict "path" "/health" "port" "http-dashboard")) . | toYaml -}}
{{- end -}}

{{- define "memusage.podSpec" -}}
{{- $values := .root.Values -}}
{{- $cluster := $values.cluster -}}
{{- $own := index $cluster .role -}}
{{- $flight := ternary (include "memusage.flight" .root) "" (eq .role "worker") -}}
serviceAccountName: {{ include "memusage.serviceAccount" .root }}
automountServiceAccountToken: false
# Variables of Services whose names begin with dask would be configuration to Dask.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $own.terminationGracePeriodSeconds }}
securityContext:
  {{- toYaml $cluster.podSecurityContext | nindent 2 }}
{{- with $cluster.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if $values.package.install }}
initContainers:
  - {{- include "memusage.installer" .root | nindent 4 }}
{{- end }}
containers:
  - name: {{ .role }}
    image: {{ include "memusage.image" .root }}
    imagePullPolicy: {{ $cluster.image.pullPolicy }}
    command: {{ toJson $cluster.command }}
    args:
      {{- include "memusage.arguments" . | nindent 6 }}
    env:
      {{- include "memusage.environment" . | nindent 6 }}
    ports:
      {{- if eq .role "scheduler" }}
      - {name: tcp-comm, containerPort: 8786, protocol: TCP}
      {{- else }}
      - {name: tcp-worker, containerPort: 8789, protocol: TCP}
      - {name: tcp-nanny, containerPort: 8790, protocol: TCP}
      {{- end }}
      - {name: http-dashboard, containerPort: {{ include "memusage.httpPort" . }}, protocol: TCP}
    {{- range $probe := list "startupProbe" "readinessProbe" "livenessProbe" }}
    {{- with index $own $probe }}
    {{ $probe }}:
      {{- include "memusage.probe" . | nindent 6 }}
    {{- end }}
    {{- end }}
    resources:
      {{- toYaml $own.resources | nindent 6 }}
    securityContext:
      {{- toYaml $cluster.securityContext | nindent 6 }}
    volumeMounts:
      - {name: config, mountPath: {{ include "memusage.configPath" .root }}, readOnly: true}
      - {name: scratch, mountPath: /var/lib/dask-scratch}
      - {name: tmp, mountPath: /tmp}
      {{- if $values.package.install }}
      - {name: dask-memusage, mountPath: {{ $values.package.path }}, readOnly: true}
      {{- end }}
      {{- if $flight }}
      - {name: flight, mountPath: {{ $flight }}}
      {{- end }}
      {{- with $own.volumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap: {name: {{ include "memusage.configMap" .root }}}
  - name: scratch
    emptyDir: {sizeLimit: {{ $own.scratchSize }}}
  - name: tmp
    emptyDir: {sizeLimit: {{ $own.scratchSize }}}
  {{- if $values.package.install }}
  - name: dask-memusage
    emptyDir: {sizeLimit: {{ $values.package.sizeLimit }}}
  {{- end }}
  {{- if $flight }}
  # Outlives a container that is killed for memory: the next one of this pod tells what ran.
  - name: flight
    emptyDir: {sizeLimit: 16Mi}
  {{- end }}
  {{- with $own.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with index $own $name }}
{{ $name }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}
